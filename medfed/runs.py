"""Submit the app to a SuperLink and follow the run to its end."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from medfed.errors import MedfedError
from medfed.paths import Home

if TYPE_CHECKING:
    from superlink.control import Control

PROJECT = Path(__file__).resolve().parents[1]
RunConfig = Mapping[str, bool | float | int | str]


class RunError(MedfedError):
    """A run did not end as it should."""


@dataclass(frozen=True)
class Outcome:
    """A run that ended well.

    Attributes:
        run_id: Flower's id of the run.
        folder: its record, see ``app.record``.
        summary: the record's ``summary.json``.
    """

    run_id: int
    folder: Path
    summary: dict[str, Any]

    @property
    def adapter(self) -> Path:
        """The last checkpoint, a PEFT folder."""
        return self.folder / str(self.summary["adapter"])


def run(
    control: Control,
    home: Home,
    overrides: RunConfig,
    console: Console,
    *,
    simulate: int | None = None,
) -> Outcome:
    """Start a run of this project's app and show its rounds until it ends.

    Args:
        control: the SuperLink.
        home: where the SuperLink writes its runs.
        overrides: of the run config in ``pyproject.toml``.
        console: where progress is drawn.
        simulate: at a SuperLink that simulates: how many SuperNodes.

    Raises:
        RunError: the run failed or was stopped; the message is the ServerApp's own.
    """
    from flwr.cli.build import build_fab_from_disk

    from medfed.follow import RoundsView, events

    run_id = control.start_run(build_fab_from_disk(PROJECT), overrides, simulate=simulate)
    folder = home.runs / str(run_id)
    stream = events(folder / "events.jsonl", lambda: control.run(run_id).finished)
    last = RoundsView(console, _rounds(overrides)).show(stream)
    summary = folder / "summary.json"
    if summary.is_file():
        return Outcome(run_id, folder, json.loads(summary.read_text(encoding="utf-8")))
    reason = last["reason"] if last and last["event"] == "failed" else control.run(run_id).details
    raise RunError(
        f"run {run_id} did not finish: {reason or control.run(run_id).status}",
        f"flwr log {run_id} local-deployment --show prints the ServerApp's log",
    )


def default_config() -> dict[str, bool | float | int | str]:
    """The run config of ``pyproject.toml``, flat."""
    from flwr.common.config import flatten_dict

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    return flatten_dict(project["tool"]["flwr"]["app"]["config"])


def _rounds(overrides: RunConfig) -> int:
    return int({**default_config(), **overrides}["num-server-rounds"])
