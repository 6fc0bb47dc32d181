"""Where medfed keeps things on this machine: one folder, one rule."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """The folder named by ``MEDFED_HOME`` (default ``~/.medfed``) and the places in it."""

    root: Path

    @classmethod
    def from_environment(cls) -> Home:
        """Read ``MEDFED_HOME``; nothing is created."""
        return cls(Path(os.environ.get("MEDFED_HOME", "~/.medfed")).expanduser().resolve())

    @property
    def models(self) -> Path:
        """Base models, one folder each (``local/NAME`` in the run config)."""
        return self.root / "models"

    @property
    def datasets(self) -> Path:
        """Datasets, one folder each (``local/NAME`` in the run config)."""
        return self.root / "datasets"

    @property
    def partitions(self) -> Path:
        """One folder per SuperNode: what it mounts read-only."""
        return self.root / "partitions"

    @property
    def certs(self) -> Path:
        """The CA, the SuperLink's certificate and the SuperNodes' key pairs."""
        return self.root / "certs"

    @property
    def superlink(self) -> Path:
        """The SuperLink's durable state and log."""
        return self.root / "superlink"

    @property
    def supernodes(self) -> Path:
        """One folder per SuperNode of the process federation: log and Flower home."""
        return self.root / "supernodes"

    @property
    def sites(self) -> Path:
        """One folder per SuperNode that has a gate: policy, approved FABs, audit log."""
        return self.root / "sites"

    @property
    def federation(self) -> Path:
        """The processes that ``medfed up`` started."""
        return self.root / "federation.json"

    @property
    def runs(self) -> Path:
        """One folder per run: metrics, checkpoints, record."""
        return self.root / "runs"
