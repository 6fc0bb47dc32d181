"""``medfed data``: what a hospital asks of its own cards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from app.cards.check import DataReport

app = typer.Typer(help="Look at a hospital's own data.", no_args_is_help=True)

# Enough to see what is wrong; --json lists all of them.
_SHOWN_ROWS = 20


@app.callback()
def data() -> None:
    """Look at a hospital's own data."""


@app.command()
def check(
    path: Annotated[
        Path, typer.Argument(help="A .jsonl, .csv or .parquet file, or a folder of them.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Count tokens as this model does, e.g. local/NAME.")
    ] = None,
    seq_length: Annotated[int, typer.Option(help="The run's train.seq-length, in tokens.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say what the data holds, and refuse, by file and line, what a run could not use."""
    from app.cards import check

    counter = None if model is None else check.token_counter(model)
    report = check.check(path, counter, seq_length)
    if as_json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        _print(report)
    if report.bad_rows:
        raise typer.Exit(1)


def _print(report: DataReport) -> None:
    facts = {
        "files": ", ".join(str(file) for file in report.files),
        "rows": f"{report.rows:,}",
        "rows that cannot be used": f"{len(report.bad_rows):,}",
        "  of these, empty answers": f"{report.empty_answers:,}",
        "duplicates": f"{report.duplicates:,}",
    }
    if report.tokens is not None:
        lengths = report.tokens
        facts["tokens a card"] = f"mean {lengths.mean:.0f}, p95 {lengths.p95}, max {lengths.max}"
        facts[f"cards over {lengths.seq_length} tokens"] = f"{lengths.over_seq_length:.1%}"
    for name, value in facts.items():
        print(f"{name:<26}{value}")
    for bad in report.bad_rows[:_SHOWN_ROWS]:
        print(f"error: {bad}", file=sys.stderr)
    if len(report.bad_rows) > _SHOWN_ROWS:
        more = len(report.bad_rows) - _SHOWN_ROWS
        print(f"error: and {more:,} rows more (--json lists them)", file=sys.stderr)
    if report.bad_rows:
        print("hint: mend or remove these rows", file=sys.stderr)
