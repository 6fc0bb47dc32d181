"""``medfed report``: one page about one run."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def report(
    run: Annotated[str, typer.Argument(help="Its id, its folder, or `last`.", metavar="RUN")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where it is, and the facts on it.")
    ] = False,
) -> None:
    """Write a run's report: one self-contained HTML page, and its plots as PNG."""
    from medfed import records
    from medfed.paths import Home
    from medfed.report import facts, write

    home = Home.from_environment()
    record = records.find(home, run)
    page = write(home, record)
    if as_json:
        print(json.dumps({"report": str(page), **facts(home, record)}))
    else:
        print(page)
