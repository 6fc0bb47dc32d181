"""Show a run that is under way: its rounds, losses, nodes and bytes, as its record grows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Event = dict[str, Any]

_POLL_S = 0.25
_ASK_S = 3.0  # how often the SuperLink is asked whether the run is over


def events(file: Path, is_over: Callable[[], bool], *, ended: int = 0) -> Iterator[Event]:
    """Yield the events of a run's ``events.jsonl`` as they are written.

    Ends after ``finished`` or ``failed``, or once ``is_over`` says that nobody will write more.
    A line that is only half there is read again when it is whole.

    Args:
        file: may not be there yet.
        is_over: asked now and then.
        ended: bytes of a run that failed before, and now goes on: its end is not the end.
    """
    position = 0
    next_question = time.monotonic()
    while True:
        over = False
        if time.monotonic() >= next_question:
            over = is_over()
            next_question = time.monotonic() + _ASK_S
        if file.exists():
            with file.open("rb") as log:
                log.seek(position)
                for line in log:
                    if not line.endswith(b"\n"):
                        break
                    position += len(line)
                    event = json.loads(line)
                    yield event
                    if event["event"] in ("finished", "failed") and position > ended:
                        return
        if over:
            return
        time.sleep(_POLL_S)


class RoundsView:
    """A progress bar and one row a round, on ``console``; plain lines where it is no terminal."""

    def __init__(self, console: Console, rounds: int, nodes: int | None = None) -> None:
        self._console = console
        self._rounds = rounds
        self._rows: dict[int, dict[str, Any]] = {}
        self._status = "waiting for the ServerApp to start"
        self._nodes = nodes
        self._bytes = 0
        self._progress = Progress(
            TextColumn("rounds"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self._task = self._progress.add_task("rounds", total=rounds, status=self._status)

    def show(self, stream: Iterator[Event]) -> Event | None:
        """Draw every event of ``stream``; return the last one."""
        last = None
        if not self._console.is_terminal:
            for last in stream:
                self._take(last)
                self._console.print(f"{self._status}")
            return last
        with Live(self._draw(), console=self._console, refresh_per_second=4) as live:
            for last in stream:
                self._take(last)
                live.update(self._draw())
        return last

    def _take(self, event: Event) -> None:
        name, number = event["event"], event.get("round", 0)
        row = self._rows.setdefault(number, {}) if number or name == "holdout" else {}
        if name == "waiting":
            self._status = f"{event['online']} of {event['needed']} needed institutions online"
        elif name == "online":
            self._nodes = len(event["institutions"])
            self._status = f"{self._nodes} institutions online"
        elif name == "round-started":
            row["institutions"] = ", ".join(event["institutions"])
            self._status = f"round {number}: training at {row['institutions']}"
        elif name == "reply":
            loss, seconds = event["train_loss"], event["train_seconds"]
            self._status = f"round {number}: {event['institution']} {loss:.4f} in {seconds:.1f} s"
        elif name in ("reply-failed", "reply-missing", "reply-rejected", "institution-lost"):
            reason = event.get("reason", "no reply in time")
            self._status = f"round {number}: {event['institution']} gave no adapter: {reason}"
        elif name == "asked":
            row["institutions"] = f"{row['institutions']}, {event['institution']}"
            self._status = f"round {number}: {event['institution']} asked ({event['because']})"
        elif name == "quarantined":
            bad = event["bad_replies"]
            self._status = f"{event['institution']} is quarantined after {bad} bad replies"
        elif name == "round-retried":
            self._status = f"round {number}: trying again ({event['reason']})"
        elif name == "paused":
            self._status = f"round {number} paused, waiting for {event['waits_for']}"
        elif name == "resumed":
            self._status = f"going on after round {event['after_round']}"
        elif name == "round-finished":
            row |= {"loss": event["train_loss"], "bytes": event["bytes"], "s": event["seconds"]}
            self._bytes = sum(other.get("bytes", 0) for other in self._rows.values())
            self._progress.update(self._task, completed=number)
            self._status = f"round {number} done: loss {event['train_loss']:.4f}"
        elif name == "holdout":
            row["holdout"] = event["loss"]
            self._status = f"round {number}: held-out loss {event['loss']:.4f}"
        elif name == "checkpoint":
            self._status = f"round {number}: checkpoint {event['folder']}"
        elif name == "failed":
            self._status = f"failed: {event['reason']}"
        elif name == "finished":
            self._status = "finished"
        self._progress.update(self._task, status=self._status)

    def _draw(self) -> Group:
        nodes = f"{self._nodes} nodes, " if self._nodes else ""
        caption = f"{nodes}{self._bytes / 2**20:.1f} MB of adapters"
        table = Table(caption=caption, box=None, header_style="bold")
        for heading in ("round", "institutions", "loss", "held out", "MB", "seconds"):
            numeric = heading not in ("institutions",)
            table.add_column(heading, justify="right" if numeric else "left")
        for number, row in sorted(self._rows.items())[-12:]:
            table.add_row(
                str(number),
                row.get("institutions", "before training"),
                _number(row.get("loss"), ".4f"),
                _number(row.get("holdout"), ".4f"),
                _number(row["bytes"] / 2**20 if "bytes" in row else None, ".2f"),
                _number(row.get("s"), ".1f"),
            )
        return Group(table, self._progress)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
