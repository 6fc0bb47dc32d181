"""The round ledger: what a run needs to go on, durable before the next round begins.

::

    ledger/round_7.safetensors   global adapter and the strategy's memory after round 7
    ledger/round_7.json          the rest of the state, and the digest of the file above
    ledger/flight_8/plan.json    in-flight state of round 8: who was asked, by which message
    ledger/flight_8/NAME.safetensors   NAME's reply, once it was accepted
    ledger/starts.json           the ServerApp's starts since the last finished round

Each file is written whole or not at all (``app.durable``), and a round's ``.json`` comes last. A
round without one, or whose digest differs from it, does not count; the round before it does.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common import log
from safetensors import SafetensorError
from safetensors.numpy import load, save

from app import durable
from app.adapter.layout import FlatArray, Manifest, digest
from app.errors import AppError
from app.server.reply_checks import Accepted
from app.server.strategies import State

KEPT_ROUNDS = 3

_ADAPTER = "adapter"
_STRATEGY = "strategy."


@dataclass(frozen=True)
class Saved:
    """The state of a run after a round.

    Attributes:
        round: its number; 0 is the state before the first.
        flat: the global adapter.
        strategy: the strategy's memory.
        bytes: communication so far.
        lines: lines of ``comm_cost.txt`` so far.
        norms: of the last accepted updates, oldest first.
        bad_replies: institution → how many of its replies were rejected.
        holdout_before: held-out loss before training; None where it is not measured.
        holdout_after: the last one measured.
        train_loss: of the round.
    """

    round: int
    flat: FlatArray
    strategy: State = field(default_factory=dict)
    bytes: int = 0
    lines: int = 0
    norms: tuple[float, ...] = ()
    bad_replies: dict[str, int] = field(default_factory=dict)
    holdout_before: float | None = None
    holdout_after: float | None = None
    train_loss: float | None = None


@dataclass
class Plan:
    """The in-flight state of a round: what has been sent and what became of it.

    Attributes:
        run_id: of the Flower run whose messages these are; no other can ask for their replies.
        asked: institution → ids of the messages that it was sent, oldest first.
        activated: institution → when its SuperNode had last connected as it was asked.
        failed: institution → why it gave nothing.
        replacements: how many were asked in place of others.
        retries: how often the round was begun anew.
        bytes_out: of adapters, so far.
        bytes_in: likewise.
    """

    run_id: int
    asked: dict[str, list[str]] = field(default_factory=dict)
    activated: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    replacements: int = 0
    retries: int = 0
    bytes_out: int = 0
    bytes_in: int = 0


class Ledger:
    """One run's ledger.

    Args:
        folder: where it is; made when something is first written.
        manifest: the layout of the adapter.

    Raises:
        AppError: ``folder`` belongs to a run with another adapter.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self._manifest = manifest

    def last(self) -> Saved | None:
        """The last round that is whole; None before the first.

        A round that is damaged is passed over with a warning: the one before it is as good.

        Raises:
            AppError: there are rounds, and none is whole, or they are of another adapter.
        """
        numbers = self._rounds()
        for number in numbers:
            try:
                return self._read(number)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                log(WARNING, "Ledger: round %d in %s is damaged: %s", number, self.folder, error)
        if numbers:
            raise AppError(
                f"expected a whole round in {self.folder}, found {len(numbers)} that are damaged",
                "start the run anew; a checkpoint peft_N of this one may still be good",
            )
        return None

    def commit(self, saved: Saved) -> None:
        """Make a round durable, and delete its in-flight state and all but the last few rounds.

        Raises:
            AppError: the disk cannot take it; the rounds before are as they were.
        """
        with durable.disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {_ADAPTER: saved.flat}
        arrays |= {f"{_STRATEGY}{name}": value for name, value in saved.strategy.items()}
        content = save(arrays)
        state = asdict(saved)
        del state["flat"], state["strategy"]
        state |= {
            "sha256": hashlib.sha256(content).hexdigest(),
            "adapter_sha256": digest(saved.flat),
            "manifest_sha256": self._manifest.digest,
        }
        durable.write(self._file(saved.round, "safetensors"), content)
        durable.write(self._file(saved.round, "json"), json.dumps(state, indent=1).encode())
        for in_flight in self.folder.glob("flight_*"):
            shutil.rmtree(in_flight, ignore_errors=True)
        if len(starts := self._starts()) > 1:
            self._note_starts(starts[-1:])
        for old in self._rounds()[KEPT_ROUNDS:]:
            self._file(old, "json").unlink(missing_ok=True)
            self._file(old, "safetensors").unlink(missing_ok=True)

    def in_flight(self, server_round: int) -> InFlight:
        """The in-flight state of a round, empty if it has not begun."""
        return InFlight(self.folder / f"flight_{server_round}", self._manifest)

    def started(self, run_id: int) -> int:
        """Note a start of the ServerApp; how many there were, the last round's own counted.

        Starts of a run under another id count for nothing.

        Raises:
            AppError: the disk cannot take it.
        """
        starts = [*self._starts(), {"run_id": run_id, "time": round(time.time(), 3)}]
        with durable.disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._note_starts(starts)
        return sum(start["run_id"] == run_id for start in starts)

    def _starts(self) -> list[dict[str, float]]:
        try:
            return list(json.loads((self.folder / "starts.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return []

    def _note_starts(self, starts: list[dict[str, float]]) -> None:
        durable.write(self.folder / "starts.json", json.dumps(starts).encode())

    def _rounds(self) -> list[int]:
        found = (re.fullmatch(r"round_(\d+)\.json", file.name) for file in self._files())
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def _files(self) -> Iterable[Path]:
        return self.folder.iterdir() if self.folder.is_dir() else ()

    def _file(self, number: int, kind: str) -> Path:
        return self.folder / f"round_{number}.{kind}"

    def _read(self, number: int) -> Saved:
        state: dict[str, Any] = json.loads(self._file(number, "json").read_text(encoding="utf-8"))
        content = self._file(number, "safetensors").read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != state.pop("sha256"):
            raise ValueError(f"its arrays have another digest, {found[:12]}")
        if state.pop("manifest_sha256") != self._manifest.digest:
            raise AppError(
                f"expected the adapter of this run in {self.folder}, found another's",
                "model.name and model.lora.* must be those that the run began with",
            )
        del state["adapter_sha256"]
        arrays = load(content)
        return Saved(
            flat=arrays.pop(_ADAPTER),
            strategy={name.removeprefix(_STRATEGY): value for name, value in arrays.items()},
            norms=tuple(state.pop("norms")),
            **state,
        )


class InFlight:
    """The in-flight state of a round on disk: who was asked, and which replies were accepted.

    Args:
        folder: where it is; made with the first plan.
        manifest: the layout of the adapter.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest

    def plan(self) -> Plan | None:
        """The plan; None for a round that nobody was asked in."""
        try:
            return Plan(**json.loads((self._folder / "plan.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log(WARNING, "Ledger: %s is damaged, the round begins anew: %s", self._folder, error)
            return None

    def note(self, plan: Plan) -> None:
        """Make the plan durable.

        Raises:
            AppError: the disk cannot take it.
        """
        with durable.disk(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        durable.write(self._folder / "plan.json", json.dumps(asdict(plan), indent=1).encode())

    def accept(self, name: str, reply: Accepted) -> None:
        """Keep an accepted reply: its institution is not asked to train again.

        Raises:
            AppError: the disk cannot take it.
        """
        facts = {"metrics": json.dumps(reply.metrics), "norm": repr(reply.norm)}
        facts["sha256"] = digest(reply.flat)
        content = save({_ADAPTER: reply.flat}, metadata=facts)
        durable.write(self._folder / f"{name}.safetensors", content)

    def accepted(self, names: Iterable[str]) -> dict[str, Accepted]:
        """What was accepted of these institutions."""
        found = {}
        for name in names:
            file = self._folder / f"{name}.safetensors"
            if file.is_file() and (reply := self._read(file)) is not None:
                found[name] = reply
        return found

    def _read(self, file: Path) -> Accepted | None:
        try:
            content = file.read_bytes()
            length = int.from_bytes(content[:8], "little")
            facts = json.loads(content[8 : 8 + length])["__metadata__"]
            flat = load(content)[_ADAPTER]
            if digest(flat) != facts["sha256"] or flat.shape != (self._manifest.size,):
                raise ValueError("its array has another digest")
            return Accepted(flat, json.loads(facts["metrics"]), float(facts["norm"]))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log(WARNING, "Ledger: %s is damaged, its institution is asked again: %s", file, error)
            return None
