"""Reading the records that runs leave behind (``app/server/run_record.py`` writes them)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import MedfedError
from medfed.paths import Home


class RecordError(MedfedError):
    """A run's record is missing or not whole."""


@dataclass(frozen=True)
class Reply:
    """What one institution sent in one round.

    Attributes:
        institution: its name.
        adapter_sha256: of the adapter that it sent.
        tensor_digests: see ``app.adapter.layout.tensor_digests``.
        metrics: the numbers of its reply, by name.
    """

    institution: str
    adapter_sha256: str
    tensor_digests: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Round:
    """One finished round.

    Attributes:
        number: from 1.
        institutions: who was asked, by name.
        replies: what was summed, in the order in which it was.
        adapter_sha256: of the new global adapter.
        train_loss: mean over the institutions, weighted by their examples.
        bytes: of the array records, both ways.
        seconds: from the first message to the new global adapter.
        holdout_loss: on cards that no institution trains on; None where it was not measured.
    """

    number: int
    institutions: tuple[str, ...]
    replies: tuple[Reply, ...]
    adapter_sha256: str
    train_loss: float
    bytes: int
    seconds: float
    holdout_loss: float | None


@dataclass(frozen=True)
class Record:
    """One run's folder, read.

    Attributes:
        folder: where it is.
        config: the resolved run config, flat, by the run config's own keys.
        provenance: see ``app.server.provenance``.
        rounds: the finished rounds, in order.
        summary: ``summary.json``; None for a run that has not ended well.
        events: every event, in order.
    """

    folder: Path
    config: dict[str, Any]
    provenance: dict[str, Any]
    rounds: tuple[Round, ...]
    summary: dict[str, Any] | None
    events: tuple[dict[str, Any], ...]

    @property
    def run_id(self) -> str:
        """Flower's id of the run."""
        return self.folder.name

    @property
    def engine(self) -> str:
        """``simulation`` or ``deployment``; "" if it ended before that was known."""
        online = [event for event in self.events if event["event"] == "online"]
        return str(online[0]["engine"]) if online else ""


def find(home: Home, run: str) -> Record:
    """Read the record of ``run``: an id, the word ``last``, or a folder.

    Raises:
        RecordError: there is none, or a file of it is missing or damaged.
    """
    if run == "last":
        folders = [path for path in home.runs.glob("*/config.json") if path.parent.is_dir()]
        if not folders:
            raise RecordError(f"expected a run in {home.runs}, found none", "medfed run, first")
        return read(max(folders, key=lambda path: path.stat().st_mtime).parent)
    folder = Path(run) if Path(run).is_dir() else home.runs / run
    return read(folder)


def read(folder: Path) -> Record:
    """Read one run's folder.

    Raises:
        RecordError: a file of it is missing or damaged.
    """
    if not folder.is_dir():
        raise RecordError(
            f"expected the record of a run in {folder}, found no such folder",
            "its id is what `medfed run` and `flwr run` print; `last` is the newest",
        )
    config = _json(folder / "config.json")
    events = tuple(_events(folder / "events.jsonl"))
    finished = (folder / "summary.json").is_file()
    try:
        rounds = tuple(_rounds(events))
    except (KeyError, TypeError) as error:
        raise RecordError(
            f"expected the events of rounds in {folder}/events.jsonl, found one without {error}",
            "it was written by another version of medfed: read it with that one",
        ) from None
    return Record(
        folder=folder,
        config=config,
        provenance=_json(folder / "provenance.json"),
        rounds=rounds,
        summary=_json(folder / "summary.json") if finished else None,
        events=events,
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(
            f"expected {file.name} in {file.parent}, found none", "is this a run's folder?"
        ) from None
    except (OSError, ValueError) as error:
        raise RecordError(f"expected JSON in {file}, found: {error}", "it is damaged") from None
    if not isinstance(content, dict):
        raise RecordError(f"expected a JSON object in {file}, found another", "it is damaged")
    return content


def _events(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise RecordError(
            f"expected {file.name} in {file.parent}, found: {error.strerror}",
            "is this a run's folder?",
        ) from None
    # The last line of a run that was killed may be half there.
    whole = [line for line in lines if line.endswith("\n")]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise RecordError(f"expected JSON lines in {file}, found: {error}", "damaged") from None


_NOT_METRICS = {"event", "time", "round", "institution", "adapter_sha256", "tensor_digests"}


def _rounds(events: tuple[dict[str, Any], ...]) -> list[Round]:
    asked: dict[int, list[str]] = {}
    replies: dict[int, dict[str, Reply]] = {}
    finished: dict[int, dict[str, Any]] = {}
    holdout: dict[int, float] = {}
    for event in events:
        name, number = event["event"], event.get("round", 0)
        if name == "round-started":  # anew after a restart: what came before is not summed
            asked[number], replies[number] = list(event["institutions"]), {}
        elif name == "asked" and event["institution"] not in asked[number]:
            asked[number].append(event["institution"])
        elif name == "reply":
            replies[number][event["institution"]] = Reply(
                event["institution"],
                event["adapter_sha256"],
                event["tensor_digests"],
                {key: value for key, value in event.items() if key not in _NOT_METRICS},
            )
        elif name == "round-finished":
            finished[number] = event
        elif name == "holdout":
            holdout[number] = event["loss"]
    return [
        Round(
            number=number,
            institutions=tuple(asked[number]),
            replies=tuple(reply for _, reply in sorted(replies[number].items())),
            adapter_sha256=event["adapter_sha256"],
            train_loss=event["train_loss"],
            bytes=event["bytes"],
            seconds=event["seconds"],
            holdout_loss=holdout.get(number),
        )
        for number, event in sorted(finished.items())
    ]
