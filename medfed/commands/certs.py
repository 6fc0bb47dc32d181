"""``medfed certs``: issue and show the federation's certificates and keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

app = typer.Typer(
    help="The federation's CA, the SuperLink's certificate, the SuperNodes' keys.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("issue")
def issue(
    san: Annotated[
        list[str] | None,
        typer.Option(help="A further DNS name or IP address of the SuperLink. May be repeated."),
    ] = None,
) -> None:
    """Issue what is missing. What is there and good stays; a second run changes nothing."""
    import certs
    from medfed.paths import Home
    from supernode import roster

    folder = Home.from_environment().certs
    issued = certs.issue(folder, roster.load().names, san or ())
    for line in summary(issued.actions):
        print(line)
    if issued.actions:
        print(f"in {folder}")
    else:
        print(f"Nothing to do: everything in {folder} is there and valid.")


@app.command("show")
def show(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show names, fingerprints and expiry."""
    from datetime import UTC, datetime

    import certs
    from medfed.paths import Home

    folder = Home.from_environment().certs
    records = certs.inspect(folder)
    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": record.name,
                        "kind": record.kind,
                        "fingerprint": record.fingerprint,
                        "not-before": record.not_before.isoformat() if record.not_before else None,
                        "not-after": record.not_after.isoformat() if record.not_after else None,
                        "path": str(record.path),
                        "sans": list(record.sans),
                    }
                    for record in records
                ]
            )
        )
        return
    if not records:
        raise certs.CertsError(
            f"expected certificates in {folder}, found none", "`medfed certs issue` makes them"
        )
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("fingerprint (SHA-256)", overflow="fold")
    table.add_column("valid until", no_wrap=True)
    table.add_column("for", overflow="fold")
    for record in records:
        expiry = "does not expire"
        if record.not_after is not None:
            days = (record.not_after - datetime.now(UTC)).days
            expiry = f"{record.not_after:%Y-%m-%d} ({days} days)"
        table.add_row(record.name, record.fingerprint, expiry, ", ".join(record.sans))
    Console().print(table)


def summary(actions: Sequence[str]) -> list[str]:
    """What ``certs.issue`` did, with the key pairs of many SuperNodes on one line."""
    made = "made the key pair of "
    names = [action.removeprefix(made) for action in actions if action.startswith(made)]
    lines = [action for action in actions if not action.startswith(made)]
    if names:
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        lines.append(f"{made}{span}")
    return lines
