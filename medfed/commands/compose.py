"""``medfed compose``: the Compose files, their federation, and its one-shot services."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medfed.commands import options

SUPERLINK = "operator:8000"
Superlink = Annotated[str, typer.Option(help="The operators' gateway, HOST:PORT.")]

app = typer.Typer(help="The federation in containers: its files, its one-shots.")


@app.command()
def render(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if a file would change.")
    ] = False,
    roster: Annotated[
        Path | None, typer.Option(help="The roster (default: supernode/roster.toml).")
    ] = None,
    project: Annotated[Path, typer.Option(help="The folder of the Compose files.")] = Path(),
) -> None:
    """Make the Compose files say what the roster says."""
    from common.files import write
    from supernode import compose
    from supernode.roster import load

    different = compose.drift(project, load(roster))
    for path, text in different.items():
        if check:
            typer.echo(f"{path.name} differs from the roster", err=True)
        else:
            write(path, text.encode())
            typer.echo(f"rendered {path.name}")
    if check and different:
        typer.echo("hint: medfed compose render", err=True)
        raise typer.Exit(1)


@app.command()
def connect(
    project: Annotated[Path, typer.Option(help="The folder of the Compose files.")] = Path(),
) -> None:
    """`medfed connect` for the Compose federation that is up: its address, its CA."""
    from medfed.commands.connect import connect as connect_to
    from medfed.composed import fetch_ca, published_address
    from medfed.paths import Home

    ca = Home.from_environment().root / "compose" / "ca.crt"
    fetch_ca(project, ca)
    connect_to(superlink=published_address(project), ca=ca)


@app.command()
def provision() -> None:
    """In a container: issue, prepare, and lay in each volume what its owner gets."""
    from medfed.provision import provision as provision_all

    provision_all()


@app.command()
def register(superlink: Superlink = SUPERLINK) -> None:
    """In a container: make the SuperLink know every SuperNode's public key."""
    from medfed.provision import register as register_all

    register_all(superlink)


@app.command()
def demo(
    run_config: options.RunConfig = None,
    once: Annotated[
        bool, typer.Option("--once", help="Do nothing if a run has ended well before.")
    ] = False,
    superlink: Superlink = SUPERLINK,
) -> None:
    """In a container: the demo's run on the federation that is up, and its summary."""
    from medfed.commands.run import run
    from medfed.provision import finished_run

    if once and (done := finished_run()) is not None:
        typer.echo(f"run {done.name} ended well before; for another one:")
        typer.echo("    docker compose run --rm demo --run-config num-server-rounds=3")
        return
    run(run_config=run_config, demo=True, superlink=superlink)
