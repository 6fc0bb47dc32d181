"""The run's folder: what was asked for, what happened, and the adapters that came of it."""

from __future__ import annotations

import fcntl
import json
import time
from pathlib import Path
from typing import IO, Any

from app import durable
from app.config import RunConfig
from app.errors import AppError
from app.paths import medfed_home

_LOCK_S = 30.0


class RunRecord:
    """``$MEDFED_HOME/runs/RUN/``: what was asked for, where it came from, what happened.

    ``config.json``, ``provenance.json``, ``events.jsonl``, ``comm_cost.txt``, ``ledger/``
    (``app.server.ledger``), ``peft_N/`` and ``summary.json``.

    Events are appended as they happen, one JSON object a line, so that a reader can follow a run
    that is under way; ``summary.json`` comes last and marks a run that ended well.
    """

    def __init__(self, folder: Path) -> None:
        with durable.disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.reopened = False  # it was there already
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, run_id: int, config: RunConfig) -> RunRecord:
        """Open the folder of run ``run_id`` under ``MEDFED_HOME``, or of the run it goes on with.

        A run that goes on with another has that one's folder, under both ids.

        Raises:
            AppError: there is no such run, or it was another: the first setting that differs; or
                another ServerApp still writes to it.
        """
        runs = medfed_home() / "runs"
        folder = runs / str(run_id)
        if config.resume_run:
            earlier = runs / config.resume_run
            if not (earlier / "config.json").is_file():
                raise AppError(
                    f"resume-run: expected a run in {earlier}, found none",
                    "medfed run --resume takes the id that medfed run printed",
                )
            if not folder.exists():
                with durable.disk(folder):
                    folder.symlink_to(earlier.resolve().name)
        record = cls(folder.resolve())
        record._only_writer()
        known = record.folder / "config.json"
        record.reopened = known.is_file()
        if record.reopened:
            config.check_same(json.loads(known.read_text(encoding="utf-8")))
        else:
            record._write("config.json", config.flat())
        return record

    def _only_writer(self) -> None:
        """Keep out a ServerApp that was given up but has not died yet, for as long as we live."""
        file = self.folder / ".lock"
        with durable.disk(file):
            self._lock = file.open("w", encoding="utf-8")
        end = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise AppError(
                        f"expected to be the only ServerApp that writes to {self.folder}, found "
                        "another at work",
                        "let it end, or end it (its process is flwr-serverapp)",
                    ) from None
                time.sleep(0.1)

    @property
    def finished(self) -> bool:
        """Whether this run has already ended well."""
        return (self.folder / "summary.json").is_file()

    def provenance(self, origin: dict[str, Any]) -> None:
        """Note what the run's results come from (``app.server.provenance``)."""
        self._write("provenance.json", origin)

    def origin(self) -> dict[str, Any] | None:
        """What ``provenance`` noted; None if it has not."""
        file = self.folder / "provenance.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def event(self, name: str, **details: Any) -> None:
        """Append one event, stamped with the time in seconds since the epoch."""
        line = json.dumps({"event": name, "time": round(time.time(), 3), **details})
        file = self.folder / "events.jsonl"
        with durable.disk(file), file.open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def finish(self, **summary: Any) -> None:
        """Write ``summary.json``: the mark of a run that ended well."""
        self._write("summary.json", summary)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        durable.write(self.folder / name, json.dumps(content, indent=2).encode())
