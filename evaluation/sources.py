"""Where a benchmark's rows come from: a folder of JSONL, or the hub by the leaderboard's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import EvaluationError
from evaluation.task import Row, Task

# Where the hub keeps the Parquet that it makes out of data sets with loading scripts.
PARQUET_REVISION = "refs/convert/parquet"


def rows_of(task: Task, folder: Path | None) -> list[Row]:
    """All rows of a benchmark, in order.

    Args:
        task: the benchmark.
        folder: holds one file ``<benchmark>*.jsonl``, rows in the source's own schema; None: hub.

    Raises:
        EvaluationError: no such folder or file, several, an unreadable line, or no way to the hub.
    """
    return read_jsonl(find_file(task, folder)) if folder is not None else _from_hub(task)


def find_file(task: Task, folder: Path) -> Path:
    """The one file ``<benchmark>*.jsonl`` in ``folder``.

    Raises:
        EvaluationError: there is no such folder, no such file or more than one.
    """
    if not folder.is_dir():
        raise EvaluationError(
            f"expected a folder with benchmark data, found none at {folder}",
            "--data DIR names a folder; leave it out to read from the hub",
        )
    found = sorted(folder.glob(f"{task.name}*.jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise EvaluationError(
            f"expected one file {task.name}*.jsonl in {folder}, found {names}",
            f"put {task.title} there as {task.name}.jsonl, or leave the benchmark out",
        )
    return found[0]


def read_jsonl(path: Path) -> list[Row]:
    """The objects of a JSON Lines file, in order.

    Raises:
        EvaluationError: the file is empty, or a line (named) is not a JSON object.
    """
    rows: list[Row] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"expected JSON lines in {path}, found {error}", "") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
        except ValueError as error:
            raise EvaluationError(
                f"expected a JSON object on line {number} of {path}, found {error}",
                "every line is one question (JSON Lines)",
            ) from error
        if not isinstance(row, dict):
            raise EvaluationError(
                f"expected a JSON object on line {number} of {path}, found a {type(row).__name__}",
                "every line is one question (JSON Lines)",
            )
        rows.append(row)
    if not rows:
        raise EvaluationError(
            f"expected questions in {path}, found an empty file", "fetch the data set again"
        )
    return rows


def _from_hub(task: Task) -> list[Row]:
    from datasets import load_dataset

    hub = task.hub
    revision = PARQUET_REVISION if hub.scripted else None
    # The hub's client raises too many kinds of error (network, HTTP, builders) to import them all;
    # these are what they are made of.
    try:
        loaded = load_dataset(hub.dataset, hub.config, split=hub.split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(
            f"expected {task.title} on the hub as {hub.dataset}, found no way to it ({reason})",
            "check the network, or give --data DIR with the data set as JSON lines",
        ) from error
    return [dict(row) for row in loaded]
