"""The one scorer: what the leaderboard counts, and what it does not show.

``is_correct`` reproduces the leaderboard's comparison with all its quirks: of a multiple-choice
answer it reads the first letter, so "Based on ..." is a B; a "maybe" must be written exactly so.
Everything else here says how much of such a number is format.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import EvaluationError
from evaluation.statistics import wilson
from evaluation.task import Task

# What the leaderboard's clean-up accepts; anything else is compared as it was written.
_RECOGNISED = frozenset({"a", "b", "c", "d", "e", "yes", "no"})
_STUTTERS = (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no"))


@dataclass(frozen=True)
class Generation:
    """One line of a generation file: what was asked, what is right, what the model wrote."""

    prompt: str
    gold: str
    output: str


@dataclass(frozen=True)
class Score:
    """How good a set of generations is. Rates are shares of ``n``, from 0 to 1.

    Attributes:
        accuracy: the leaderboard's own measure.
        interval: its 95 % Wilson interval.
        valid: outputs whose first word is one of the answers asked for.
        lucky: correct by the leaderboard's clean-up although not valid ("Based" read as B).
        trivial_answer: the constant answer that scores best on these very questions.
        trivial_accuracy: what it scores.
        outputs: the most frequent outputs with their counts.
    """

    benchmark: str
    n: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    valid: float
    lucky: float
    trivial_answer: str
    trivial_accuracy: float
    outputs: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "benchmark": self.benchmark,
            "n": self.n,
            "accuracy": self.accuracy,
            "correct": self.correct,
            "interval_95": list(self.interval),
            "valid_rate": self.valid,
            "lucky_rate": self.lucky,
            "trivial_baseline": {"answer": self.trivial_answer, "accuracy": self.trivial_accuracy},
            "above_trivial": self.accuracy - self.trivial_accuracy,
            "outputs": self.outputs,
        }


def is_correct(output: str, gold: str, *, boolean: bool) -> bool:
    """Whether the leaderboard counts ``output`` as the answer ``gold``.

    Args:
        output: what the model wrote.
        gold: the right answer; long forms ("... answer is: B ###") are understood.
        boolean: yes/no/maybe (True) or a letter (False).
    """
    written, wanted = output.lower(), gold.lower()
    answer = written
    if "\n##" in answer:
        answer = answer.split("\n##")[1].split("\n")[0].strip()
    right = wanted
    if "###" in right:
        parts = right.split("answer is:")
        if len(parts) < 2:
            return written == wanted
        right = parts[1].split("###")[0].strip()
    answer = re.sub(" +", " ", re.sub(r"[^a-zA-Z0-9]", " ", answer).strip())
    answer = _unstutter(answer) if boolean else answer[:1]
    # Unrecognised: both sides stay as they were written.
    return answer == right if answer in _RECOGNISED else written == wanted


def _unstutter(answer: str) -> str:
    for stutter, meant in _STUTTERS:
        if stutter in answer:
            return answer.replace(stutter, meant)
    return answer


def is_valid(output: str, answers: Sequence[str]) -> bool:
    """Whether the first word of ``output`` is one of ``answers``, whatever its case."""
    word = re.search(r"[^\W_]+", output)
    return word is not None and word.group().lower() in {answer.lower() for answer in answers}


def marks(task: Task, generations: Sequence[Generation]) -> list[bool]:
    """For each generation whether the leaderboard counts it as correct."""
    return [is_correct(g.output, g.gold, boolean=task.boolean) for g in generations]


def best_constant(task: Task, golds: Sequence[str]) -> tuple[str, float]:
    """The constant answer that scores best on ``golds``, and its accuracy (trivial baseline)."""
    hits = {
        answer: sum(is_correct(answer, gold, boolean=task.boolean) for gold in golds)
        for answer in task.answers
    }
    best = max(task.answers, key=lambda answer: hits[answer])
    return best, hits[best] / len(golds)


def score(task: Task, generations: Sequence[Generation]) -> Score:
    """Score generations of one benchmark.

    Raises:
        EvaluationError: there are none.
    """
    if not generations:
        raise EvaluationError(
            f"expected generations of {task.title}, found none", "the file is empty"
        )
    correct = marks(task, generations)
    valid = [is_valid(g.output, task.answers) for g in generations]
    n = len(generations)
    constant, constant_accuracy = best_constant(task, [g.gold for g in generations])
    return Score(
        benchmark=task.name,
        n=n,
        correct=sum(correct),
        accuracy=sum(correct) / n,
        interval=wilson(sum(correct), n),
        valid=sum(valid) / n,
        lucky=sum(c and not v for c, v in zip(correct, valid, strict=True)) / n,
        trivial_answer=constant,
        trivial_accuracy=constant_accuracy,
        outputs=dict(Counter(g.output for g in generations).most_common(10)),
    )


def read_generations(path: Path, task: Task) -> list[Generation]:
    """Read generations: a JSON array (as the leaderboard's evaluation writes it) or JSON lines.

    Raises:
        EvaluationError: no such file, empty, not JSON, or not ``prompt, gold, output`` of ``task``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EvaluationError(
            f"expected a generation file at {path}, found none that can be read ({reason})",
            "give the path of a generation_*.jsonl",
        ) from error
    if not text.strip():
        raise EvaluationError(
            f"expected generations in {path}, found an empty file", "run the evaluation again"
        )
    rows = _json_rows(text, path)
    if not rows:
        raise EvaluationError(
            f"expected generations in {path}, found an empty list", "run the evaluation again"
        )
    return [_generation(row, number, path, task) for number, row in enumerate(rows, start=1)]


def _json_rows(text: str, path: Path) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise EvaluationError(
                f"expected a JSON array in {path}, found {error}", "the file is cut off or damaged"
            ) from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise EvaluationError(
                f"expected a JSON object on line {number} of {path}, found {error}",
                "a generation file is a JSON array or one JSON object a line",
            ) from error
    return rows


def _generation(row: Any, number: int, path: Path, task: Task) -> Generation:
    fields = ("prompt", "gold", "output")
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in fields):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise EvaluationError(
            f"expected texts prompt, gold, output in record {number} of {path}, found {found}",
            "a generation file is a JSON array or one JSON object a line",
        )
    allowed = task.answers if task.boolean else (*task.answers, "E")
    gold = row["gold"]
    if "###" not in gold and gold.lower() not in {answer.lower() for answer in allowed}:
        raise EvaluationError(
            f"expected gold answers out of {', '.join(allowed)} for {task.title}, "
            f"found {gold!r} in record {number} of {path}",
            "is --benchmark the one that these generations belong to?",
        )
    return Generation(row["prompt"], gold, row["output"])
