"""The run's folder: what was asked for, what happened, and the adapters that came of it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from app.config import RunConfig
from app.places import medfed_home


class RunRecord:
    """``$MEDFED_HOME/runs/RUN/``: what was asked for, where it came from, what happened.

    ``config.json``, ``provenance.json``, ``events.jsonl``, ``comm_cost.txt``, ``peft_N/`` and
    ``summary.json``.

    Events are appended as they happen, one JSON object a line, so that a reader can follow a run
    that is under way; ``summary.json`` comes last and marks a run that ended well.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    @classmethod
    def create(cls, run_id: int, config: RunConfig) -> RunRecord:
        """Open the folder of run ``run_id`` under ``MEDFED_HOME`` and note its config."""
        record = cls(medfed_home() / "runs" / str(run_id))
        record._write("config.json", config.flat())
        return record

    def provenance(self, origin: dict[str, Any]) -> None:
        """Note what the run's results come from (``app.provenance``)."""
        self._write("provenance.json", origin)

    def event(self, name: str, **details: Any) -> None:
        """Append one event, stamped with the time in seconds since the epoch."""
        line = json.dumps({"event": name, "time": round(time.time(), 3), **details})
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    def finish(self, **summary: Any) -> None:
        """Write ``summary.json``: the mark of a run that ended well."""
        self._write("summary.json", summary)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        partial = self.folder / f".{name}.partial"
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / name)
