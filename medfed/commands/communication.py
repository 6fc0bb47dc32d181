"""``medfed comm``: what a run costs in communication, before or after it ran."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def communication(
    run: Annotated[
        str | None, typer.Argument(help="A run: its id, its folder, or `last`.", metavar="RUN")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Foretell for this model: a SmolLM2, local/NAME, a folder.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to foretell.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="Institutions a round.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """What a run costs: of a model that has not run (--model), or of a run that has (RUN)."""
    from medfed import communication as cost
    from medfed import records
    from medfed.paths import Home

    home = Home.from_environment()
    if (run is None) == (model is None):
        raise cost.CommunicationError(
            f"expected a run or --model, found {'neither' if run is None else 'both'}",
            "medfed comm last, or medfed comm --model SmolLM2-135M --rounds 200",
        )
    if model is not None:
        foretold = cost.predict(home, model, rounds, clients=clients).as_dict()
        print(json.dumps(foretold)) if as_json else _print_prediction(foretold)
    elif run is not None:
        found = cost.of_run(home, records.find(home, run))
        print(json.dumps(found)) if as_json else _print_run(found)


def _print_prediction(found: dict[str, Any]) -> None:
    print(
        f"{found['model']}: {found['rounds']} rounds, {found['clients']} institutions a round, "
        f"{found['parameters']:,} parameters in {found['tensors']} tensors"
    )
    print(f"an array for each tensor, as in the reference: {found['reference_mb']:.2f} MB")
    print(f"one flat array, as here:                       {found['flat_mb']:.2f} MB")
    _print_budget(found)


def _print_run(found: dict[str, Any]) -> None:
    each = found["bytes"] / max(1, len(found["rounds"])) / 2**20
    print(
        f"run {found['run_id']}: {found['mb']:.2f} MB of adapters in {len(found['rounds'])} "
        f"rounds, {each:.2f} MB a round"
    )
    if found["wire"] is None:
        print("on the wire: not known here (a simulation, or SuperNodes on other machines)")
    else:
        wire = found["wire"]
        print(
            f"on the wire, with HTTP and TLS: {wire['bytes'] / 2**20:.2f} MB "
            f"({wire['sent'] / 2**20:.2f} sent, {wire['received'] / 2**20:.2f} received by "
            f"{len(wire['supernodes'])} SuperNodes)"
        )
    _print_budget(found)


def _print_budget(found: dict[str, Any]) -> None:
    word = "within" if found["within_budget"] else "OVER"
    print(f"{word} the leaderboard's budget of {found['budget_mb']:,} MB")
