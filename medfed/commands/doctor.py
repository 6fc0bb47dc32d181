"""``medfed doctor``: what this machine offers, and what a federation lacks on it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from compat import Report


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Show which hooks into Flower are active here. Exits 1 if one is not."""
    from compat import report

    found = report()
    if as_json:
        print(json.dumps({"flower": found.as_json()}))
    else:
        print_hooks(found)
    if found.off:
        raise typer.Exit(1)


def print_hooks(found: Report) -> None:
    """A table of every hook, and below it why those that are off are off."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("hook", "of the", "active", "gives"):
        table.add_column(heading)
    for hook in found.hooks:
        active = "yes" if hook.active else "[red]no[/red]"
        table.add_row(hook.name, hook.side, active, hook.gives if hook.active else hook.without)
    console = Console()
    console.print(f"{found.summary()} (every hook was read in {', '.join(found.supported)})")
    console.print(table)
    for hook in found.off:
        for reason in hook.reasons:
            console.print(f"{hook.name}: {reason}", highlight=False, soft_wrap=True)
