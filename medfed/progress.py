"""Progress of long work, on standard error: bars on a terminal, lines anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Progress = Callable[[str, int, int], None]


@contextmanager
def live_progress(console: Console | None = None) -> Iterator[Progress]:
    """A progress bar for each stage on standard error; without a terminal, a line for each."""
    console = console or Console(stderr=True)
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}
    finished: set[str] = set()

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done, total=total)
        if bars.disable and done == total and stage not in finished:
            finished.add(stage)
            console.print(f"{stage}: {done}/{total}")

    with bars:
        yield progress
