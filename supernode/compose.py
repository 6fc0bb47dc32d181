"""Compose files that follow the roster.

A Compose file here is written by hand, except for its rendered blocks:

    # rendered: supernodes
    ...
    # end

What stands between the two lines is made from ``supernode/roster.toml``, so that the twenty
services, their keys, partitions, CPU shares and GPU slices are never written twice. The result is
committed, and a test fails when it differs from what the roster says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import SuperNodeError
from .roster import Roster, SuperNodeEntry

FILES = ("docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.gate.yml")

_BEGIN, _END = "# rendered: ", "# end"
_MOST_NETWORKS = 250


def render(text: str, roster: Roster) -> str:
    """Fill every rendered block of a Compose file anew.

    Args:
        text: the file as it is.
        roster: the SuperNodes.

    Raises:
        SuperNodeError: a block has an unknown name, or no end.
    """
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
            indent = line[: len(line) - len(line.lstrip())]
            lines += [f"{indent}{made}".rstrip() for made in _block(inside)(roster)]
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


def _block(name: str) -> Callable[[Roster], Iterator[str]]:
    try:
        return _BLOCKS[name]
    except KeyError:
        raise SuperNodeError(
            f"expected a rendered block named {', '.join(_BLOCKS)}, found {name!r}",
            "supernode/compose.py says what each one holds",
        ) from None


def _institutions(roster: Roster) -> Iterator[str]:
    yield "MEDFED_INSTITUTIONS: >-"
    names = list(roster.names)
    for start in range(0, len(names), 5):
        last = start + 5 >= len(names)
        yield "  " + ",".join(names[start : start + 5]) + ("" if last else ",")


def _sites(roster: Roster) -> Iterator[str]:
    for name in roster.names:
        yield f"- {name}:/sites/{name}"


def _healthy(roster: Roster) -> Iterator[str]:
    for name in roster.names:
        yield f"{name}: *healthy"


def _gateway_networks(roster: Roster) -> Iterator[str]:
    for name in roster.names:
        yield f"{name}:"


def _networks(roster: Roster) -> Iterator[str]:
    if len(roster.supernodes) > _MOST_NETWORKS:
        raise SuperNodeError(
            f"expected at most {_MOST_NETWORKS} SuperNodes on one machine, found "
            f"{len(roster.supernodes)}",
            "each has a network of its own; the others run elsewhere and come to MEDFED_FLEET",
        )
    for position, name in enumerate(roster.names):
        subnet = f"${{MEDFED_SUBNETS:-10.77}}.{position}.0/28"
        yield f"{name}:"
        yield "  internal: true"
        yield "  driver_opts: *no-host"
        yield f"  ipam: {{config: [{{subnet: '{subnet}'}}]}}"


def _volumes(roster: Roster) -> Iterator[str]:
    for name in roster.names:
        yield f"{name}:"


def _supernodes(roster: Roster) -> Iterator[str]:
    for position, entry in enumerate(roster.supernodes):
        if position:
            yield ""
        yield f"{entry.name}:"
        yield "  <<: *supernode"
        if not position:
            # Compose builds an image once for every service that asks for it: one does.
            yield "  build: *supernode-build"
        yield f"  hostname: {entry.name}"
        yield f"  cpus: {entry.cpus:g}"
        yield f"  networks: [{entry.name}]"
        yield f"  volumes: [*models, '{entry.name}:/site:ro']"
        yield f"  command: {_command(entry)}"


def _gpu_slices(roster: Roster) -> Iterator[str]:
    for entry in roster.supernodes:
        if entry.gpu is None:
            continue
        yield f"{entry.name}:"
        yield f"  command: {_command(entry, '--gpu')}"
        yield "  environment: *one-gpu"
        yield "  deploy:"
        yield "    resources:"
        yield "      reservations:"
        yield "        devices:"
        yield "          - driver: nvidia"
        yield "            capabilities: [gpu]"
        yield f"            device_ids: ['{entry.gpu.device}']"


def _gated(roster: Roster) -> Iterator[str]:
    for name in roster.names:
        yield f"{name}:"
        yield "  entrypoint: *gated"
        yield f"  volumes: ['{name}-gate:/gate:ro', '{name}-audit:/audit']"


def _gate_sites(roster: Roster) -> Iterator[str]:
    for name in roster.names:
        yield f"- {name}-gate:/medfed/sites/{name}"
        yield f"- {name}-audit:/medfed/sites/{name}/audit:ro"


def _gate_volumes(roster: Roster) -> Iterator[str]:
    for name in roster.names:
        yield f"{name}-gate:"
        yield f"{name}-audit:"


def _command(entry: SuperNodeEntry, *more: str) -> str:
    return f"[{', '.join(('--name', entry.name, f'--key=/site/{entry.name}.key', *more))}]"


_BLOCKS: dict[str, Callable[[Roster], Iterator[str]]] = {
    "institutions": _institutions,
    "sites": _sites,
    "healthy": _healthy,
    "gateway-networks": _gateway_networks,
    "networks": _networks,
    "volumes": _volumes,
    "supernodes": _supernodes,
    "gpu-slices": _gpu_slices,
    "gated": _gated,
    "gate-sites": _gate_sites,
    "gate-volumes": _gate_volumes,
}
