"""``medfed demo``: from nothing to a trained adapter, in front of you."""

from __future__ import annotations

from typing import Annotated

import typer


def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of federated training.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train the embedded model on the embedded flashcards, with 20 SuperNodes on this machine."""
    from medfed.demo import run_demo

    run_demo(rounds, as_json)
