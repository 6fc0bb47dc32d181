"""The leaderboard's four benchmarks by name, in the order of its table."""

from __future__ import annotations

from common.errors import EvaluationError
from evaluation.careqa import CareQA
from evaluation.medmcqa import MedMCQA
from evaluation.medqa import MedQA
from evaluation.pubmedqa import PubMedQA
from evaluation.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (PubMedQA, MedMCQA, MedQA, CareQA)}


def task(name: str) -> Task:
    """A benchmark by name.

    Raises:
        EvaluationError: there is none of that name.
    """
    if name not in TASKS:
        raise EvaluationError(
            f"expected a benchmark out of {', '.join(TASKS)}, found {name!r}",
            "give several as pubmedqa,medqa",
        )
    return TASKS[name]()


def tasks(names: str) -> list[Task]:
    """Benchmarks from a comma-separated list, each once, in the order given.

    Raises:
        EvaluationError: a name is unknown or there is none.
    """
    wanted = dict.fromkeys(name.strip() for name in names.split(",") if name.strip())
    if not wanted:
        raise EvaluationError(
            "expected at least one benchmark, found none", f"choose from {', '.join(TASKS)}"
        )
    return [task(name) for name in wanted]
