"""``medfed run``: submit the app to a federation that is up, and watch its rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medfed.commands import options


def run(
    run_config: options.RunConfig = None,
    demo: options.Demo = False,
    superlink: Annotated[
        str, typer.Option(help="The SuperLink's address, HOST:PORT.")
    ] = "127.0.0.1:8000",
    ca: Annotated[
        Path | None, typer.Option(help="The federation's CA certificate (default: our own).")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(metavar="RUN", help="Go on with a run that was cut short: its id, or last."),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Submit the app, show its rounds live, print what came of it."""
    from rich.console import Console

    from compat.run_config import parse_config_args
    from medfed import demo as demo_run
    from medfed.paths import Home
    from medfed.runs import run as run_app
    from superlink.control import Control

    home = Home.from_environment()
    overrides = {**(demo_run.CONFIG if demo else {}), **parse_config_args(run_config)}
    with Control(superlink, ca or home.certs / "ca.crt") as control:
        outcome = run_app(control, home, overrides, Console(stderr=True), resume=resume)
    demo_run.report(outcome, as_json)
