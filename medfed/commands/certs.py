"""``medfed certs``: the federation's certificates and keys, from their first day to their last."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from certs import Record
    from medfed.paths import Home

app = typer.Typer(
    help="The federation's CA, what it signs, the SuperNodes' keys; from first day to last.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Address = Annotated[
    str | None,
    typer.Option(
        "--superlink",
        help="The SuperLink's address, HOST:PORT (default: what `medfed up` started).",
    ),
]


class Step(StrEnum):
    """A step of ``rotate-ca``."""

    BEGIN = "begin"
    SWITCH = "switch"
    FINISH = "finish"


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
def show(as_json: Json = False) -> None:
    """Show names, fingerprints and expiry."""
    from datetime import UTC, datetime

    import certs
    from medfed.paths import Home

    folder = Home.from_environment().certs
    records = certs.inspect(folder)
    if as_json:
        print(json.dumps([_as_json(record) for record in records]))
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


@app.command("check")
def check(
    within: Annotated[int, typer.Option(min=0, help="Days.")] = 30,
    as_json: Json = False,
) -> None:
    """Exit with 1 if a certificate has expired, or will within so many days."""
    from datetime import UTC, datetime, timedelta

    import certs
    from medfed.paths import Home

    folder = Home.from_environment().certs
    if not certs.inspect(folder):
        raise certs.CertsError(
            f"expected certificates in {folder}, found none", "`medfed certs issue` makes them"
        )
    found = certs.expiring(folder, timedelta(days=within))
    if as_json:
        print(json.dumps({"ok": not found, "expiring": [_as_json(record) for record in found]}))
    for record in found:
        if record.not_after is None or as_json:
            continue
        days = (record.not_after - datetime.now(UTC)).days
        when = f"expires in {days} days" if days >= 0 else "has expired"
        how = "rotate-ca begin" if record.kind == "ca" else "renew"
        print(f"{record.name}: {when} ({record.not_after:%Y-%m-%d}): medfed certs {how}")
    if not found and not as_json:
        print(f"nothing expires within {within} days")
    if found:
        raise typer.Exit(1)


@app.command("renew")
def renew(
    within: Annotated[
        int, typer.Option(min=0, help="Renew what has less than so many days left.")
    ] = 30,
) -> None:
    """Renew the SuperLink's and the operator's certificate. The CA, keys and names stay."""
    from datetime import timedelta

    import certs
    from medfed.paths import Home

    actions = certs.renew(Home.from_environment().certs, timedelta(days=within))
    for line in actions:
        print(line)
    if actions:
        print("A SuperLink that runs takes its own up within seconds; no run is stopped.")
    else:
        print(f"Nothing to do: everything has more than {within} days left.")


@app.command("rotate-ca")
def rotate_ca(step: Annotated[Step, typer.Argument(help="begin, switch or finish.")]) -> None:
    """Replace the CA in three steps, with a hand-out of ca.crt after the first and the last."""
    import certs
    from medfed.paths import Home

    folder = Home.from_environment().certs
    if step is Step.BEGIN:
        made = certs.begin_rotation(folder)
        print(f"made the next CA, valid until {made.not_valid_after_utc:%Y-%m-%d}")
        print(f"next: hand out {folder / 'ca.crt'}, which trusts both, to every SuperNode and")
        print("operator, and restart SuperLink and SuperNodes; then: medfed certs rotate-ca switch")
    elif step is Step.SWITCH:
        for line in certs.switch_rotation(folder):
            print(line)
        print("the new CA signs from now on, and the old one's key is gone")
        print("next, when every SuperNode is online again: medfed certs rotate-ca finish")
    else:
        certs.finish_rotation(folder)
        print(f"the new CA is trusted alone; hand out {folder / 'ca.crt'} once more")


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="The institution's name.")],
    reason: Annotated[str, typer.Option(help="Why; kept in revoked.json.")] = "",
    superlink: Address = None,
) -> None:
    """Put an institution out: its key is unregistered, and never taken again."""
    import certs
    from medfed.paths import Home
    from superlink.control import Control

    home = Home.from_environment()
    revoked = certs.revoke(home.certs, name, reason)
    print(f"revoked {revoked.fingerprint}, the key of {name}")
    if (address := superlink or _running(home)) is None:
        print("no SuperLink runs here: the next `medfed up` unregisters it before anyone connects")
        print("for one elsewhere: the same command with --superlink HOST:PORT")
        return
    with Control(address, home.certs / "ca.crt") as control:
        gone = control.unregister([revoked.public_key.encode()])
    was = "unregistered" if gone else "was not registered"
    print(f"{was} at {address}; a round in flight goes on without it")


@app.command("enrol")
def enrol(
    name: Annotated[str, typer.Argument(help="The institution's name.")],
    public_key: Annotated[Path, typer.Argument(help="The .pub file that it made and sent.")],
    readmit: Annotated[
        bool, typer.Option("--readmit", help="Let a revoked name come back with this new key.")
    ] = False,
    superlink: Address = None,
) -> None:
    """Take in an institution by the public key it made itself; its private key stays with it."""
    import certs
    from medfed.paths import Home
    from superlink.control import Control

    home = Home.from_environment()
    fingerprint = certs.enrol(home.certs, name, public_key, readmit)
    print(f"enrolled {name} with {fingerprint}: compare it with what ssh-keygen -lf prints there")
    if (address := superlink or _running(home)) is None:
        print("no SuperLink runs here: the same command with --superlink HOST:PORT registers it")
        return
    with Control(address, home.certs / "ca.crt") as control:
        control.register({name: home.certs / "supernodes" / f"{name}.pub"})
    print(f"registered at {address}")


def _running(home: Home) -> str | None:
    """The address of the SuperLink that `medfed up` started and that still runs."""
    from medfed import processes

    federation = processes.load(home)
    if federation is None or federation.superlink.find() is None:
        return None
    return federation.address


def _as_json(record: Record) -> dict[str, object]:
    return {
        "name": record.name,
        "kind": record.kind,
        "fingerprint": record.fingerprint,
        "not-before": record.not_before.isoformat() if record.not_before else None,
        "not-after": record.not_after.isoformat() if record.not_after else None,
        "path": str(record.path),
        "sans": list(record.sans),
    }


def summary(actions: Sequence[str]) -> list[str]:
    """What ``certs.issue`` did, with the key pairs of many SuperNodes on one line."""
    made = "made the key pair of "
    names = [action.removeprefix(made) for action in actions if action.startswith(made)]
    lines = [action for action in actions if not action.startswith(made)]
    if names:
        span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
        lines.append(f"{made}{span}")
    return lines
