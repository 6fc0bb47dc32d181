"""The files that the leaderboard's evaluation leaves behind, under its names and in its format."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.scorer import Generation


def write_accuracy(folder: Path, benchmark: str, run_name: str, accuracy: float) -> Path:
    """Write ``acc_<benchmark>_<run>.txt``."""
    path = folder / f"acc_{benchmark}_{run_name}.txt"
    write_whole(path, f"Accuracy: {accuracy}. ")
    return path


def write_generations(
    folder: Path, benchmark: str, run_name: str, generations: Sequence[Generation]
) -> Path:
    """Write ``generation_<benchmark>_<run>.jsonl``: a JSON array, for all its name says."""
    path = folder / f"generation_{benchmark}_{run_name}.jsonl"
    rows = [{"prompt": g.prompt, "gold": g.gold, "output": g.output} for g in generations]
    # pandas writes the upstream file: compact, ASCII, slashes escaped.
    write_whole(path, json.dumps(rows, separators=(",", ":")).replace("/", "\\/"))
    return path


def write_report(folder: Path, run_name: str, report: dict[str, Any]) -> Path:
    """Write ``report_<run>.json``: all figures of an evaluation."""
    path = folder / f"report_{run_name}.json"
    write_whole(path, json.dumps(report, indent=2) + "\n")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
