"""Compose files that follow the roster.

A Compose file here is written by hand, except for its rendered blocks:

    # rendered: supernodes
    ...
    # end

What stands between the two lines is made from ``supernode/roster.toml`` by the macro of that name
in ``compose.j2``, so that the twenty services, their keys, partitions, CPU shares and GPU slices
are never written twice. The result is committed, and a test fails when it differs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.errors import SuperNodeError

from .roster import Roster

FILES = ("docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.gate.yml")

_BEGIN, _END = "# rendered: ", "# end"
_MOST_NETWORKS = 250


def render(text: str, roster: Roster) -> str:
    """Fill every rendered block of a Compose file anew.

    Args:
        text: the file as it is.
        roster: the SuperNodes.

    Raises:
        SuperNodeError: a block has an unknown name, or no end; or there are more SuperNodes than
            networks for them.
    """
    if len(roster.supernodes) > _MOST_NETWORKS:
        raise SuperNodeError(
            f"expected at most {_MOST_NETWORKS} SuperNodes on one machine, found "
            f"{len(roster.supernodes)}",
            "each has a network of its own; the others run elsewhere and come to MEDFED_FLEET",
        )
    blocks = _blocks(roster)
    lines: list[str] = []
    inside = ""
    for line in text.splitlines():
        content = line.strip()
        if inside:
            if content != _END:
                continue
            inside = ""
        lines.append(line)
        if content.startswith(_BEGIN):
            inside = content.removeprefix(_BEGIN)
            if inside not in blocks:
                names = ", ".join(sorted(blocks))
                raise SuperNodeError(
                    f"expected a rendered block named {names}, found {inside!r}",
                    "supernode/compose.j2 has a macro for each one",
                )
            indent = line[: len(line) - len(line.lstrip())]
            lines += [f"{indent}{made}".rstrip() for made in blocks[inside]().splitlines()]
    if inside:
        raise SuperNodeError(
            f"expected '{_END}' after '{_BEGIN}{inside}', found the end of the file",
            "put the line back; what stands before it is rendered",
        )
    return "\n".join(lines) + "\n"


def drift(root: Path, roster: Roster) -> dict[Path, str]:
    """Compose files in ``root`` that differ from the roster, each with the text it should have.

    Raises:
        SuperNodeError: a file is missing or its blocks are broken.
    """
    different = {}
    for path in (root / name for name in FILES):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SuperNodeError(
                f"expected {path.name} in {root}, found no such file",
                "run this in the root of the repository",
            ) from None
        try:
            wanted = render(text, roster)
        except SuperNodeError as error:
            raise SuperNodeError(f"{path.name}: {error}", error.hint) from None
        if wanted != text:
            different[path] = wanted
    return different


def _blocks(roster: Roster) -> dict[str, Callable[[], str]]:
    """What fills each block, by its name: the macros of ``compose.j2``."""
    environment = Environment(  # noqa: S701 - YAML, not HTML; roster.py checks every name
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    module = environment.get_template("compose.j2").make_module({"roster": roster})
    return {
        name.replace("_", "-"): macro for name, macro in vars(module).items() if callable(macro)
    }
