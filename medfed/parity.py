"""Is a simulated run what the hospitals would have trained? Bit for bit, round by round.

Every engine runs the same config; compared are who was asked, what each institution sent and what
came of it. See docs/parity.md for what equal bits need.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from app.adapter.layout import TENSOR_DIGITS
from common import files
from common.errors import MedfedError
from medfed import composed, engines, records
from medfed.paths import Home
from medfed.records import Record, Round
from medfed.runs import PROJECT, RunConfig
from supernode import roster


class ParityError(MedfedError):
    """The engines cannot be compared."""


def compare(found: Mapping[str, Record], tensors: Sequence[str]) -> dict[str, Any]:
    """Compare runs of the same config, the first of them with each of the others.

    Args:
        found: engine → its run's record.
        tensors: the adapter's tensors, in the manifest's order.

    Returns:
        ``equal``; ``engines``, each with its rounds and final ``adapter_sha256``; and
        ``first_difference``: None, or the engines, the first round, institution and tensor that
        differ, and what was found.
    """
    names = list(found)
    difference = None
    for name in names[1:]:
        difference = difference or _difference(names[0], name, found, tensors)
    return {
        "equal": difference is None,
        "engines": {name: _trace(record) for name, record in found.items()},
        "first_difference": difference,
    }


def _trace(record: Record) -> dict[str, Any]:
    return {
        "rounds": [
            {
                "round": one.number,
                "institutions": list(one.institutions),
                "replies": {reply.institution: reply.adapter_sha256 for reply in one.replies},
                "adapter_sha256": one.adapter_sha256,
            }
            for one in record.rounds
        ],
        "adapter_sha256": record.rounds[-1].adapter_sha256 if record.rounds else None,
    }


def _difference(
    one: str, other: str, found: Mapping[str, Record], tensors: Sequence[str]
) -> dict[str, Any] | None:
    ours, theirs = found[one].rounds, found[other].rounds
    for left, right in zip(ours, theirs, strict=False):
        if told := _round_difference(left, right, tensors):
            return {"engines": [one, other], "round": left.number, **told}
    if len(ours) != len(theirs):
        return {
            "engines": [one, other],
            "round": min(len(ours), len(theirs)) + 1,
            "what": "number of rounds",
            "found": [len(ours), len(theirs)],
        }
    return None


def _round_difference(left: Round, right: Round, tensors: Sequence[str]) -> dict[str, Any] | None:
    if left.institutions != right.institutions:
        asked = [list(left.institutions), list(right.institutions)]
        return {"what": "institutions asked", "found": asked}
    for mine in left.replies:
        other = next((r for r in right.replies if r.institution == mine.institution), None)
        if other is None:
            return {"what": "reply", "institution": mine.institution, "found": ["one", "none"]}
        cards = [one.metrics.get("partition_fingerprint") for one in (mine, other)]
        if cards[0] != cards[1]:
            return {"what": "cards", "institution": mine.institution, "found": cards}
        if mine.adapter_sha256 != other.adapter_sha256:
            return {
                "what": "reply",
                "institution": mine.institution,
                "tensor": _first_tensor(mine.tensor_digests, other.tensor_digests, tensors),
                "found": [mine.adapter_sha256, other.adapter_sha256],
            }
    if len(left.replies) != len(right.replies):
        more = [r.institution for r in right.replies[len(left.replies) :]]
        return {"what": "reply", "institution": more[0], "found": ["none", "one"]}
    if left.adapter_sha256 != right.adapter_sha256:
        return {"what": "global adapter", "found": [left.adapter_sha256, right.adapter_sha256]}
    return None


def _first_tensor(one: str, other: str, tensors: Sequence[str]) -> str | None:
    for position, name in enumerate(tensors):
        part = slice(position * TENSOR_DIGITS, (position + 1) * TENSOR_DIGITS)
        if one[part] != other[part]:
            return name
    return None


def prove(
    home: Home, config: RunConfig, chosen: Sequence[str], disturb: str | None, console: Console
) -> dict[str, Any]:
    """Run ``config`` in each of the engines ``chosen`` and compare what they did.

    The records and the result stay in ``$MEDFED_HOME/parity/TIME/``.

    Args:
        home: where models, datasets and partitions are.
        config: what overrides the run config.
        chosen: names of ``medfed.engines.ENGINES``, at least two.
        disturb: an institution that gets another seed in the process engine, to see that the
            comparison finds it.
        console: where progress is drawn.

    Raises:
        ParityError: fewer than two engines, an unknown one, or nothing to disturb.
    """
    _check(chosen, disturb)
    started = datetime.datetime.now(datetime.UTC)
    folder = home.root / "parity" / started.strftime("%Y%m%dT%H%M%SZ")
    found = {}
    for name in chosen:
        console.print(f"parity: {name}")
        place = folder / name
        if disturb is not None and name == "processes":
            with tempfile.TemporaryDirectory() as scratch:
                other = roster_with_another_seed(Path(scratch) / "roster.toml", disturb)
                engines.as_processes(home, config, place, console, roster_path=other)
        else:
            engines.ENGINES[name](home, config, place, console)
        found[name] = records.read(place)
    any_record = next(iter(found.values()))
    result = {
        **compare(found, any_record.provenance["adapter"]["tensors"]),
        "date": started.isoformat(timespec="seconds"),
        "config": any_record.config,
        "app_sha256": any_record.provenance["app_sha256"],
        "disturbed": disturb,
        "folder": str(folder),
    }
    files.write(folder / "parity.json", json.dumps(result, indent=2).encode())
    return result


def available(console: Console) -> list[str]:
    """The engines that this machine can run now, saying which it leaves out and why."""
    chosen = ["simulation", "processes"]
    try:
        composed.published_address(PROJECT)
    except composed.ComposeError as error:
        console.print(f"parity: without containers: {error} (hint: {error.hint})")
        return chosen
    return [*chosen, "containers"]


def _check(chosen: Sequence[str], disturb: str | None) -> None:
    unknown = [name for name in chosen if name not in engines.ENGINES]
    if unknown or len(set(chosen)) < 2:
        raise ParityError(
            f"expected two or more of {', '.join(engines.ENGINES)}, "
            f"found {', '.join(chosen) or 'none'}",
            "--engines simulation,processes",
        )
    if disturb is not None and "processes" not in chosen:
        raise ParityError(
            f"expected the engine processes, in which {disturb} gets another seed, found "
            f"{', '.join(chosen)}",
            "--engines simulation,processes",
        )


def roster_with_another_seed(path: Path, institution: str) -> Path:
    """Write a roster in which ``institution`` has its neighbour's seed; the same path.

    An institution's seeds derive from its partition's number, its cards from its own folder, so an
    exchange of two numbers changes nothing else.

    Raises:
        SuperNodeError: the roster has no such institution.
    """
    entries = roster.load()
    one = entries.entry(institution)
    neighbour = next(e for e in entries.supernodes if e.name != institution)
    exchanged = {one.name: neighbour.partition, neighbour.name: one.partition}
    lines = []
    for entry in entries.supernodes:
        number = exchanged.get(entry.name, entry.partition)
        lines.append(
            f'[[supernode]]\nname = "{entry.name}"\npartition = {number}\ncpus = {entry.cpus:g}\n'
        )
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def proof_of(home: Home, app_sha256: str) -> Path | None:
    """The newest comparison of this very app in which a deployment equalled the simulation."""
    for file in sorted((home.root / "parity").glob("*/parity.json"), reverse=True):
        content = json.loads(file.read_text(encoding="utf-8"))
        compared = set(content["engines"])
        if content["app_sha256"] == app_sha256 and content["equal"] and "simulation" in compared:
            return file
    return None
