"""``medfed up``, ``status`` and ``down``: the federation as processes on this machine."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from medfed.processes import Status

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def up(
    supernodes: Annotated[
        int | None,
        typer.Option(min=1, help="Start only the first so many SuperNodes of the roster."),
    ] = None,
    port: Annotated[int, typer.Option(help="The SuperLink's port.")] = 8000,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Give each SuperNode the roster's slice of a GPU.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for all SuperNodes to come online.")
    ] = 180.0,
    as_json: Json = False,
) -> None:
    """Start a SuperLink and its SuperNodes on this machine, over TLS, each with its own key."""
    from medfed import processes
    from medfed.commands.certs import summary
    from medfed.paths import Home
    from medfed.progress import live_progress
    from supernode import roster

    with live_progress() as progress:
        done = processes.up(
            Home.from_environment(),
            roster.load(),
            count=supernodes,
            port=port,
            deadline_s=timeout,
            use_gpu=gpu,
            progress=progress,
        )
    for line in summary(done.actions):
        print(f"certs: {line}", file=sys.stderr)
    federation = done.federation
    if as_json:
        print(
            json.dumps(
                {
                    "address": federation.address,
                    "supernodes": [process.name for process in federation.supernodes],
                    "started": list(done.started),
                    "seconds": round(done.seconds, 3),
                }
            )
        )
    elif done.started:
        print(
            f"SuperLink at {federation.address}, {len(federation.supernodes)} SuperNodes online "
            f"after {done.seconds:.1f} s. `medfed status` shows them, `medfed down` ends them."
        )
    else:
        print(
            f"Already running: SuperLink at {federation.address}, "
            f"{len(federation.supernodes)} SuperNodes online."
        )


def status(as_json: Json = False) -> None:
    """Show each process, its connection and its memory. Exits 1 if one of them is down."""
    from compat import report
    from medfed import processes
    from medfed.paths import Home

    home = Home.from_environment()
    found = processes.status(home)
    flower = report()
    well = bool(found) and all(one.alive and one.online for one in found)
    if as_json:
        print(
            json.dumps(
                {
                    "flower": flower.as_json(),
                    "processes": [
                        {
                            "name": one.name,
                            "pid": one.pid,
                            "alive": one.alive,
                            "online": one.online,
                            "pss-bytes": one.pss,
                            "last-seen": one.last_seen.isoformat() if one.last_seen else None,
                            "log": one.log,
                            "gate": one.gate,
                        }
                        for one in found
                    ],
                }
            )
        )
    elif not found:
        print(f"Nothing runs: `medfed up` has not started a federation in {home.root}.")
    else:
        _print_table(found)
        print(flower.summary() + ("" if not flower.off else ": `medfed doctor` says why"))
    if not well:
        raise typer.Exit(1)


def down(as_json: Json = False) -> None:
    """End what `medfed up` started, and nothing else."""
    from medfed import processes
    from medfed.paths import Home
    from medfed.progress import live_progress

    with live_progress() as progress:
        ended = processes.down(Home.from_environment(), progress)
    if as_json:
        print(json.dumps({"stopped": list(ended)}))
    elif ended:
        print(f"Stopped {len(ended)} processes and their children.")
    else:
        print("Nothing was running.")


def _print_table(found: list[Status]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "process", "online", "gate", "pid"):
        table.add_column(heading)
    table.add_column("memory (PSS)", justify="right")
    table.add_column("last seen (UTC)")
    for one in found:
        table.add_row(
            one.name,
            "alive" if one.alive else "[red]gone[/red]",
            "yes" if one.online else "[red]no[/red]",
            "" if one.gate is None else "on" if one.gate else "off",
            str(one.pid),
            "" if one.pss is None else f"{one.pss / 2**20:.0f} MiB",
            "" if one.last_seen is None else f"{one.last_seen:%Y-%m-%d %H:%M:%S}",
        )
    total = sum(one.pss or 0 for one in found)
    table.add_row("", "", "", "", "", f"{total / 2**20:.0f} MiB", "")
    Console().print(table)
