"""Submit the app to a SuperLink and follow the run to its end."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from app.config import RENAMED, current_names
from common.errors import MedfedError
from medfed.paths import Home
from medfed.records import Record, find

if TYPE_CHECKING:
    from superlink.control import Control

_AWAY_S = 600.0  # a SuperLink that restarts is back long before

PROJECT = Path(__file__).resolve().parents[1]
RunConfig = Mapping[str, bool | float | int | str]


class RunError(MedfedError):
    """A run did not end as it should."""


@dataclass(frozen=True)
class Outcome:
    """A run that ended well.

    Attributes:
        run_id: Flower's id of the run.
        folder: its record, see ``app.server.run_record``.
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
    resume: str = "",
) -> Outcome:
    """Start a run of this project's app and show its rounds until it ends.

    Args:
        control: the SuperLink.
        home: where the SuperLink writes its runs.
        overrides: of the run config in ``pyproject.toml``.
        console: where progress is drawn.
        simulate: at a SuperLink that simulates: how many SuperNodes.
        resume: the id of a run to go on with, with its own settings.

    Raises:
        RunError: a setting that the app has not, or that is given twice; or the run failed or was
            stopped, and the message is the ServerApp's own.
    """
    from compat.fab import build_fab_from_disk
    from medfed.follow import RoundsView, events

    defaults = default_config()
    _check_names(overrides, defaults)
    overrides = current_names(overrides, lambda line: console.print(line, soft_wrap=True))
    ended = 0
    if resume:
        earlier = _unfinished(home, resume)
        config = current_names(earlier.config, warn=lambda _: None)
        overrides = {**config, **overrides, "resume-run": earlier.folder.resolve().name}
        ended = (earlier.folder / "events.jsonl").stat().st_size
    for other in control.runs():
        if not other.finished:
            console.print(
                f"run {other.run_id} goes on beside this one, at the same institutions; to end it: "
                f"flwr stop {other.run_id} local-deployment",
                soft_wrap=True,
            )
    run_id = control.start_run(build_fab_from_disk(PROJECT), overrides, simulate=simulate)
    folder = home.runs / str(run_id)
    rounds = int({**defaults, **overrides}["num-server-rounds"])
    stream = events(folder / "events.jsonl", _ending(control, run_id, console), ended=ended)
    last = RoundsView(console, rounds).show(stream)
    summary = folder / "summary.json"
    if summary.is_file():
        return Outcome(run_id, folder, json.loads(summary.read_text(encoding="utf-8")))
    reason = last["reason"] if last and last["event"] == "failed" else control.run(run_id).details
    raise RunError(
        f"run {run_id} did not finish: {reason or control.run(run_id).status}",
        f"flwr log {run_id} local-deployment --show prints the ServerApp's log; what it had "
        f"finished is kept: medfed run --resume {run_id}",
    )


def _check_names(overrides: RunConfig, known: RunConfig) -> None:
    """Say which setting is none of the app's; a SuperLink would only say that one is.

    Raises:
        RunError: naming it, and the setting that was probably meant; or one setting is given under
            its former and its current name.
    """
    for name in overrides:
        if name in RENAMED:
            if RENAMED[name] in overrides:
                raise RunError(
                    f"expected {name} or {RENAMED[name]}, found both",
                    f"{name} is the former name of {RENAMED[name]}: leave it out",
                )
        elif name not in known:
            near = [one for one in known if one.endswith(f".{name}")]
            near = near or get_close_matches(name, known, n=1)
            raise RunError(
                f"expected a setting of this app, found {name}",
                f"perhaps {near[0]}?" if near else "docs/reference.md lists them",
            )


def _unfinished(home: Home, run: str) -> Record:
    """The record of a run to go on with.

    Raises:
        RunError: it has ended well, and there is nothing to go on with.
    """
    record = find(home, run)
    if record.summary is not None:
        raise RunError(
            f"expected a run that was cut short, found run {record.run_id} finished",
            "medfed report shows it; medfed run starts another",
        )
    return record


def _ending(control: Control, run_id: int, console: Console) -> Callable[[], bool]:
    """What says whether a run has ended; of a SuperLink that is away it says no, for a while.

    Raises:
        SuperLinkError: when it is called and the SuperLink has been away for too long.
    """
    from common.errors import SuperLinkError

    away_since: float | None = None

    def is_over() -> bool:
        nonlocal away_since
        try:
            over = control.run(run_id).finished
        except SuperLinkError as error:
            now = time.monotonic()
            if away_since is None:
                away_since = now
                console.print(f"waiting for the SuperLink to come back: {error}")
            if now - away_since > _AWAY_S:
                raise
            return False
        away_since = None
        return over

    return is_over


def default_config() -> dict[str, bool | float | int | str]:
    """The run config of ``pyproject.toml``, flat."""
    from compat.run_config import flatten_dict

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    return current_names(flatten_dict(project["tool"]["flwr"]["app"]["config"]))
