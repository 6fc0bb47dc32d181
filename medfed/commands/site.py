"""``medfed site``: a hospital's gate: what may run on its data, what may leave, what happened."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import MedfedError

if TYPE_CHECKING:
    from supernode.gate.site import Site

app = typer.Typer(
    help="A hospital's gate: what may run on its data, what may leave, what happened.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Fab = Annotated[Path, typer.Argument(help="A FAB, or the folder of an app to build it from.")]
Where = Annotated[
    str | None,
    typer.Option(
        "--site", help="The site's name or folder (default: the only one under MEDFED_HOME/sites)."
    ),
]


class SiteError(MedfedError):
    """There is no such site, or none that could be meant."""


@app.command()
def init(
    names: Annotated[
        list[str],
        typer.Argument(help="The SuperNode's name, or the folder to make.", metavar="NAME"),
    ],
    parameters: Annotated[
        int | None, typer.Option(min=1, help="Numbers in the agreed adapter (default: 460800).")
    ] = None,
) -> None:
    """Write a strict policy that approves nothing yet. An existing one is left alone."""
    from supernode.gate import policy

    for name in names:
        site = _site_of(name)
        policy.create(site.policy, site.folder.name, parameters or policy.REFERENCE_PARAMETERS)
        print(f"wrote {site.policy}")
    print(f"next: medfed site review FAB --site {names[0]}, medfed site approve FAB --by YOU")


@app.command()
def review(
    fab: Fab,
    where: Where = None,
    code: Annotated[
        bool, typer.Option("--code", help="Print every file, also where there is a difference.")
    ] = False,
) -> None:
    """Show what is in a FAB, and its difference to the last one that was approved."""
    from supernode.gate import review as reviewing

    site, content = _find(where), _content(fab)
    files = reviewing.unpack(content, fab)
    last = site.last_approved()
    print(f"FAB      {hashlib.sha256(content).hexdigest()}")
    for name, body in files.items():
        print(f"file     {len(body):>9} bytes  {reviewing.visible(name)}")
    if last is None:
        print("before   nothing was approved here, so this is the whole code")
    else:
        approval, before = last
        print(
            f"before   {approval.sha256}, approved by {approval.approved_by} "
            f"on {approval.approved_at:%Y-%m-%d}"
        )
        lines = list(reviewing.difference(reviewing.unpack(before, "the last approved FAB"), files))
        print("\n".join(lines) if lines else "         no file differs")
    if code or last is None:
        for name, body in files.items():
            print(f"\n=== {reviewing.visible(name)}")
            for line in reviewing.text(body).splitlines():
                print(reviewing.visible(line))


@app.command()
def approve(
    fab: Fab,
    by: Annotated[str, typer.Option(help="Who approves it.")],
    where: Annotated[
        list[str] | None,
        typer.Option("--site", help="The site's name or folder; may be given for each of several."),
    ] = None,
    note: Annotated[str, typer.Option(help="Why, or what was looked at.")] = "",
) -> None:
    """Let a FAB run here from the SuperNode's next start on."""
    from supernode.gate import review as reviewing

    sites = [_find(one) for one in where] if where else [_find(None)]
    content = _content(fab)
    reviewing.unpack(content, fab)
    sha256 = hashlib.sha256(content).hexdigest()
    if not by.strip():
        raise SiteError("expected who approves it, found an empty --by", "--by 'Dr. A. Example'")
    for site in sites:
        if site.approve(content, by.strip(), note) is None:
            print(f"{sha256} was approved before in {site.policy}; nothing changed")
        else:
            print(
                f"approved {sha256} in {site.policy}; it holds from the SuperNode's next start on"
            )


@app.command()
def audit(
    where: Where = None,
    head: Annotated[
        str | None, typer.Option(help="A head noted earlier: it must be one of the lines.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify the audit log's chain and show what happened. Exits 1 if the chain is broken."""
    from supernode.gate import audit as log

    site = _find(where)
    try:
        chain = log.verify(site.audit, head)
    except log.BrokenChainError as error:
        if not as_json:
            raise
        print(json.dumps({"ok": False, "line": error.line, "found": str(error)}))
        raise typer.Exit(1) from None
    entries = list(log.entries(site.audit)) if chain.lines else []
    if as_json:
        told = {"ok": True, "lines": chain.lines, "head": chain.head}
        print(json.dumps({**told, "unfinished-bytes": chain.unfinished, "entries": entries}))
        return
    for entry in entries:
        rest = {
            key: value
            for key, value in entry.items()
            if key not in {"line", "time", "event", "previous"} and value not in ("", None)
        }
        facts = "  ".join(f"{key}={json.dumps(value)}" for key, value in rest.items())
        print(f"{entry['line']:>6}  {entry['time']}  {entry['event']:<8}  {facts}")
    print(f"whole: {chain.lines} lines, head {chain.head}", file=sys.stderr)
    if chain.unfinished:
        print(
            f"and {chain.unfinished} bytes of a line that was never finished: the SuperNode is "
            "writing, or was killed; its next start cuts them off and says so",
            file=sys.stderr,
        )


def _site_of(name: str) -> Site:
    from medfed.paths import Home
    from supernode.gate.site import Site

    is_folder = "/" in name or name in {".", ".."}
    return Site.at(Path(name) if is_folder else Home.from_environment().sites / name)


def _find(where: str | None) -> Site:
    """The site that is meant, which must have a policy.

    Raises:
        SiteError: there is none, or more than one.
    """
    from medfed.paths import Home
    from supernode.gate.site import Site

    if where is not None:
        site = _site_of(where)
        if site.policy.is_file():
            return site
        raise SiteError(
            f"expected a policy at {site.policy}, found none", f"medfed site init {where}"
        )
    folder = Home.from_environment().sites
    found = [path.parent for path in sorted(folder.glob("*/policy.toml"))]
    if len(found) == 1:
        return Site.at(found[0])
    names = ", ".join(path.name for path in found) or "none"
    raise SiteError(
        f"expected one site under {folder}, found {names}",
        "say which: --site NAME" if found else "medfed site init NAME",
    )


def _content(fab: Path) -> bytes:
    """The FAB's bytes, built first if ``fab`` is the folder of an app.

    Raises:
        SiteError: it cannot be read or built.
    """
    try:
        if fab.is_dir():
            from compat.fab import build_fab_from_disk

            return build_fab_from_disk(fab)
        return fab.read_bytes()
    except OSError as error:
        raise SiteError(f"expected a FAB at {fab}, found: {error.strerror}", "flwr build") from None
    except ValueError as error:
        raise SiteError(
            f"expected a Flower App in {fab}, found: {error}", "give the folder of pyproject.toml"
        ) from None
