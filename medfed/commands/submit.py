"""``medfed submit``: a leaderboard entry out of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer


def submit(
    run: Annotated[str, typer.Argument(help="Its id, its folder, or `last`.", metavar="RUN")],
    evaluation: Annotated[
        Path, typer.Option(help="The folder that `medfed evaluate --output` wrote.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="The archive. Default: submission-RUN.tar.gz here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Check a run against the leaderboard's rules and pack the entry, or name what is broken."""
    from common.errors import UserError, tell
    from medfed import records
    from medfed.paths import Home
    from medfed.runs import PROJECT
    from medfed.submission import SubmissionError, gather
    from medfed.submission import submit as pack

    home = Home.from_environment()
    entry = gather(home, records.find(home, run), evaluation, PROJECT)
    try:
        packed = pack(entry, output or Path(f"submission-{entry.record.run_id}.tar.gz"))
    except SubmissionError as error:
        if as_json:
            print(json.dumps({"packed": None, "broken": [asdict(rule) for rule in error.broken]}))
        for rule in error.broken:
            tell(UserError(str(rule), rule.hint))
        if not error.broken:
            raise
        raise typer.Exit(1) from None
    print(json.dumps({"packed": str(packed), "broken": []}) if as_json else packed)
