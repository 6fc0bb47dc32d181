"""``medfed parity``: the same run, bit for bit, wherever it runs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from medfed.commands import options


def parity(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run that is compared.")] = 3,
    engines: Annotated[
        str | None,
        typer.Option(
            help="Two or more of simulation, processes, containers, comma-separated. "
            "Default: the first two, and containers where docker compose has them up."
        ),
    ] = None,
    run_config: options.RunConfig = None,
    demo: options.Demo = False,
    disturb: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Give NAME another seed among the processes: must be found."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Run one config in every engine and compare them, round by round, bit for bit.

    Exits with 0 if all are equal, with 3 if not.
    """
    from rich.console import Console

    from compat.run_config import parse_config_args
    from medfed import demo as demo_run
    from medfed.parity import available, prove
    from medfed.paths import Home

    console = Console(stderr=True)
    chosen = [name.strip() for name in engines.split(",")] if engines else available(console)
    config = {
        **(demo_run.CONFIG if demo else {}),
        **parse_config_args(run_config),
        "num-server-rounds": rounds,
    }
    result = prove(Home.from_environment(), config, chosen, disturb, console)
    if as_json:
        print(json.dumps(result))
    else:
        _print(result)
    if not result["equal"]:
        raise typer.Exit(3)


def _print(result: dict[str, Any]) -> None:
    for name, trace in result["engines"].items():
        print(f"{name:<11} {len(trace['rounds'])} rounds, adapter {trace['adapter_sha256']}")
    difference = result["first_difference"]
    if difference is None:
        print("equal: the same institutions, replies and adapters in every round")
    else:
        where = [f"round {difference['round']}", difference["what"]]
        where += [str(difference[key]) for key in ("institution", "tensor") if difference.get(key)]
        print(f"different ({' and '.join(difference['engines'])}): {', '.join(where)}")
        for found in difference["found"]:
            print(f"    {found}")
    print(f"records: {result['folder']}")
