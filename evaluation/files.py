"""The files that the leaderboard's evaluation leaves behind, under its names and in its format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import EvaluationError
from common.files import write_or_say
from evaluation.scorer import Generation


def write_accuracy(folder: Path, benchmark: str, run_name: str, accuracy: float) -> Path:
    """Write ``acc_<benchmark>_<run>.txt``."""
    path = folder / f"acc_{benchmark}_{run_name}.txt"
    _write(path, f"Accuracy: {accuracy}. ")
    return path


def write_generations(
    folder: Path, benchmark: str, run_name: str, generations: Sequence[Generation]
) -> Path:
    """Write ``generation_<benchmark>_<run>.jsonl``: a JSON array, for all its name says."""
    path = folder / f"generation_{benchmark}_{run_name}.jsonl"
    rows = [{"prompt": g.prompt, "gold": g.gold, "output": g.output} for g in generations]
    # pandas writes the upstream file: compact, ASCII, slashes escaped.
    _write(path, json.dumps(rows, separators=(",", ":")).replace("/", "\\/"))
    return path


def write_report(folder: Path, run_name: str, report: dict[str, Any]) -> Path:
    """Write ``report_<run>.json``: all figures of an evaluation."""
    path = folder / f"report_{run_name}.json"
    _write(path, json.dumps(report, indent=2) + "\n")
    return path


def _write(path: Path, text: str) -> None:
    write_or_say(path, text.encode(), error=EvaluationError)
