"""``medfed upgrade check``: what another version of Flower would change, before it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Go from one version of Flower to another.", no_args_is_help=True)


@app.command("check")
def check(
    python: Annotated[
        Path | None,
        typer.Option(
            help="Interpreter of the environment to go to; by default the one that runs this."
        ),
    ] = None,
    database: Annotated[
        Path | None, typer.Option(help="The SuperLink's state database; by default this home's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Say what starting on another Flower would change. Exits 1 if something is in the way."""
    from medfed import upgrade
    from medfed.paths import Home

    state = database or Home.from_environment().superlink / "state.db"
    found = upgrade.check(python, state)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        for line in found.lines():
            print(line)
    if found.obstacles:
        raise typer.Exit(1)
