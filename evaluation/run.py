"""An evaluation from beginning to end: ask base model and adapter, score, compare, write down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from evaluation import files, scorer, statistics
from evaluation.generate import Answer, Engine, Request, why_one_by_one
from evaluation.journal import Journal
from evaluation.model import Subject, load_subject, with_adapter
from evaluation.scorer import Generation
from evaluation.sources import rows_of
from evaluation.task import Question, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The leaderboard's default. It decides one thing: see `requests_for`.
BATCH_SIZE = 16


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    Attributes:
        model: a hub name, ``local/NAME`` or an absolute path.
        adapter: a PEFT adapter's folder, or None for the base model alone.
        tasks: the benchmarks, in order.
        data: a folder of JSON lines, or None for the hub.
        limit: only the first so many questions of each, or None for all.
        quantization: 0, 4 or 8 bits.
        output: folder of the results.
        run_name: goes into the names of the files.
        with_base: evaluate the base model beside the adapter.
        any_base: take an adapter whose base model has another name.
        packed: let bitsandbytes' own kernels work on 4-bit weights (see `load_subject`).
    """

    model: str
    adapter: Path | None
    tasks: tuple[Task, ...]
    data: Path | None
    limit: int | None
    quantization: int
    output: Path
    run_name: str
    with_base: bool = True
    any_base: bool = False
    packed: bool = False


@dataclass(frozen=True)
class Progress:
    """Where an evaluation stands: so many of ``total`` prompts of ``what`` are answered."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class _Sheet:
    """One model's answers to one benchmark."""

    generations: list[Generation]
    option_hits: list[bool]
    alone: int
    resumed: int
    seconds: float


OnProgress = Callable[[Progress], None]


def evaluate(plan: Plan, on_progress: OnProgress = lambda _: None) -> dict[str, Any]:
    """Run a plan and write its files.

    Returns:
        The report: what was evaluated, one entry per benchmark, and the averages.

    Raises:
        EvaluationError: bad data, model or adapter; nothing is written then but journals.
        AppError: no model of that local name.
    """
    # Data first: a missing file should not cost the loading of a model.
    questions = {
        task.name: task.questions(
            rows_of(task, plan.data), from_hub=plan.data is None, limit=plan.limit
        )
        for task in plan.tasks
    }
    subject = load_subject(plan.model, plan.quantization, unpack=not plan.packed)
    base: dict[str, _Sheet] = {}
    tuned: dict[str, _Sheet] = {}
    if plan.adapter is None or plan.with_base:
        base = _answer_all(plan, "base model", subject, questions, on_progress)
    if plan.adapter is not None:
        if subject.packed and base:
            # bitsandbytes' weights that have answered do not survive PEFT's loading
            # (app/training/model.py).
            subject = load_subject(plan.model, plan.quantization, unpack=not plan.packed)
        subject = with_adapter(subject, plan.adapter, plan.model, any_base=plan.any_base)
        tuned = _answer_all(plan, "adapter", subject, questions, on_progress)
    report = _report(plan, subject, base, tuned)
    _write(plan, base, tuned, report)
    return report


def requests_for(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, batch_size: int = BATCH_SIZE
) -> list[Request]:
    """How long each answer may be: as long as the gold answer of the first row of its batch.

    That is the leaderboard's rule, batches being ``batch_size`` rows in the order of the data set.
    """
    return [
        Request(question.prompt, _tokens(tokenizer, questions[i - i % batch_size].gold))
        for i, question in enumerate(questions)
    ]


def as_generations(questions: Sequence[Question], outputs: Sequence[str]) -> list[Generation]:
    """Pair questions with outputs; of equal prompts the last one's output stands for all.

    (The leaderboard files outputs by prompt, so a later one overwrites an earlier one.)
    """
    last = {q.prompt: output for q, output in zip(questions, outputs, strict=True)}
    return [Generation(q.prompt, q.gold, last[q.prompt]) for q in questions]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def _answer_all(
    plan: Plan,
    who: str,
    subject: Subject,
    questions: dict[str, list[Question]],
    on_progress: OnProgress,
) -> dict[str, _Sheet]:
    return {
        task.name: _answer(plan, who, subject, task, questions[task.name], on_progress)
        for task in plan.tasks
    }


def _answer(
    plan: Plan,
    who: str,
    subject: Subject,
    task: Task,
    questions: list[Question],
    on_progress: OnProgress,
) -> _Sheet:
    started = perf_counter()
    requests = requests_for(questions, subject.tokenizer)
    journal = Journal(plan.output / "journal", task.name, subject.identity, requests, task.answers)
    known = journal.read()
    resumed = len(known)
    what = f"{task.title}, {who}"
    on_progress(Progress(what, resumed, len(requests)))
    engine = Engine(subject, task.answers)
    for batch in engine.answers(requests, skip=frozenset(known)):
        fresh = {n: answer for n, answer in batch.items() if n not in known}
        journal.append(fresh)
        known |= fresh
        on_progress(Progress(what, len(known), len(requests)))
    answers = [known[n] for n in range(len(requests))]
    return _Sheet(
        generations=as_generations(questions, [answer.output for answer in answers]),
        option_hits=[
            _preferred(task, a) == q.gold for a, q in zip(answers, questions, strict=True)
        ],
        alone=sum(answer.alone for answer in answers),
        resumed=resumed,
        seconds=perf_counter() - started,
    )


def _preferred(task: Task, answer: Answer) -> str:
    """The answer on offer that the model finds most likely to be the first thing said."""
    return max(zip(answer.scores, task.answers, strict=True), key=lambda pair: pair[0])[1]


def _report(
    plan: Plan, subject: Subject, base: dict[str, _Sheet], tuned: dict[str, _Sheet]
) -> dict[str, Any]:
    sheets = tuned or base
    benchmarks = []
    for task in plan.tasks:
        entry = _figures(task, sheets[task.name])
        if tuned and base:
            entry["base"] = _figures(task, base[task.name])
            entry["against_base"] = _comparison(task, tuned[task.name], base[task.name])
        benchmarks.append(entry)
    report: dict[str, Any] = {
        "model": plan.model,
        "adapter": None if plan.adapter is None else str(plan.adapter),
        "quantization": plan.quantization,
        "packed": subject.packed,
        "data": "hub" if plan.data is None else str(plan.data),
        "limit": plan.limit,
        "run_name": plan.run_name,
        "model_digest": subject.identity,
        "asked_one_by_one_because": why_one_by_one(subject),
        "benchmarks": benchmarks,
        "average": _average(benchmarks),
    }
    if tuned and base:
        report["base_average"] = _average([entry["base"] for entry in benchmarks])
    return report


def _figures(task: Task, sheet: _Sheet) -> dict[str, Any]:
    hits = sum(sheet.option_hits)
    n = len(sheet.option_hits)
    return {
        **scorer.score(task, sheet.generations).as_dict(),
        "among_options": {"accuracy": hits / n, "interval_95": list(statistics.wilson(hits, n))},
        "decided_alone": sheet.alone,
        "resumed": sheet.resumed,
        "seconds": round(sheet.seconds, 3),
    }


def _comparison(task: Task, tuned: _Sheet, base: _Sheet) -> dict[str, Any]:
    ours, theirs = scorer.marks(task, tuned.generations), scorer.marks(task, base.generations)
    return {
        "leaderboard": asdict(statistics.mcnemar(ours, theirs)),
        "among_options": asdict(statistics.mcnemar(tuned.option_hits, base.option_hits)),
    }


def _average(benchmarks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The leaderboard's unweighted mean, beside that of the trivial baselines."""
    mean, low, high = statistics.mean_of_proportions([(b["correct"], b["n"]) for b in benchmarks])
    trivial = [b["trivial_baseline"]["accuracy"] for b in benchmarks]
    options = [b["among_options"]["accuracy"] for b in benchmarks]
    return {
        "benchmarks": len(benchmarks),
        "accuracy": mean,
        "interval_95": [low, high],
        "trivial_accuracy": sum(trivial) / len(trivial),
        "above_trivial": mean - sum(trivial) / len(trivial),
        "among_options": sum(options) / len(options),
    }


def _write(
    plan: Plan, base: dict[str, _Sheet], tuned: dict[str, _Sheet], report: dict[str, Any]
) -> None:
    base_name = f"{plan.run_name}-base" if tuned else plan.run_name
    for run_name, sheets in ((base_name, base), (plan.run_name, tuned)):
        for task in plan.tasks:
            if task.name in sheets:
                generations = sheets[task.name].generations
                accuracy = scorer.score(task, generations).accuracy
                files.write_generations(plan.output, task.name, run_name, generations)
                files.write_accuracy(plan.output, task.name, run_name, accuracy)
    files.write_report(plan.output, plan.run_name, report)
