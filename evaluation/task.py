"""What a benchmark is: where its rows are, what is asked about one, which answer is right.

The words around a question are the leaderboard's, to the letter: its evaluation is what an entry
is ranked by, so a changed space would be another benchmark.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from common.errors import EvaluationError

Row = Mapping[str, Any]

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Question:
    """One prompt (before the chat wrapper) and the answer that counts as right."""

    prompt: str
    gold: str


@dataclass(frozen=True)
class HubSource:
    """Where the rows live on the hub: dataset, configuration, split, and how it is stored there."""

    dataset: str
    config: str | None
    split: str
    # Data sets defined by a loading script: only the hub's own Parquet conversion of them can
    # still be read, since `datasets` no longer runs scripts.
    scripted: bool


class Task(ABC):
    """One benchmark.

    A subclass says where its rows are and what is asked; ``questions`` does the rest.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    instruction: ClassVar[str]
    answers: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[str, ...]]
    hub: ClassVar[HubSource]
    boolean: ClassVar[bool] = False

    @abstractmethod
    def ask(self, row: Row) -> str:
        """The question as the model reads it, without instruction."""

    @abstractmethod
    def gold(self, row: Row) -> str:
        """The right answer, one of ``answers``."""

    def understand(self, rows: Sequence[Row], *, from_hub: bool) -> None:  # noqa: B027 - optional
        """Look at all rows before the first is asked; most benchmarks need not."""

    def questions(
        self, rows: Sequence[Row], *, from_hub: bool, limit: int | None = None
    ) -> list[Question]:
        """Turn rows into questions, in order; ``limit`` keeps the first ones.

        Raises:
            EvaluationError: naming the row (from 1) that is not in the benchmark's schema.
        """
        if not rows:
            raise EvaluationError(
                f"expected questions of {self.title}, found none", "the data file is empty"
            )
        for number, row in enumerate(rows, start=1):
            missing = [column for column in self.columns if row.get(column) is None]
            if missing:
                raise EvaluationError(
                    f"expected the columns {', '.join(self.columns)} of {self.title}, "
                    f"found no {missing[0]} in row {number}",
                    "use the data set in its source's own schema (docs/evaluation.md)",
                )
        self.understand(rows, from_hub=from_hub)
        return [self._question(row, number) for number, row in enumerate(rows[:limit], start=1)]

    def _question(self, row: Row, number: int) -> Question:
        try:
            prompt = f"{self.instruction}\n{self.ask(row)}\nThe answer is:\n"
            gold = self.gold(row)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise EvaluationError(
                f"expected a row of {self.title}, found something else in row {number} ({error})",
                "use the data set in its source's own schema (docs/evaluation.md)",
            ) from error
        if gold not in self.answers:
            raise EvaluationError(
                f"expected an answer out of {', '.join(self.answers)} in {self.title}, "
                f"found {gold!r} in row {number}",
                "use the split that has its answers (docs/evaluation.md)",
            )
        return Question(prompt, gold)


def multiple_choice(question: str, options: Sequence[str]) -> str:
    """A question and its lettered options, as the leaderboard lays them out."""
    if not question.endswith(("?", ".")):
        question += "?"
    lettered = "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))
    return f"Question: {question}\n\nOptions:\n{lettered}"


def wrap(prompt: str) -> str:
    """The chat wrapper that the leaderboard puts around every prompt, for every model."""
    return f"<|im_start|>question\n{prompt}<|im_end|>\n<|im_start|>answer\n"
