"""Where the app finds what this machine keeps: one folder, ``$MEDFED_HOME``."""

from __future__ import annotations

import os
from pathlib import Path

LOCAL_PREFIX = "local/"


def medfed_home() -> Path:
    """``MEDFED_HOME``, by default ``~/.medfed``; nothing is created."""
    return Path(os.environ.get("MEDFED_HOME", "~/.medfed")).expanduser().resolve()


def local_folder(kind: str, name: str) -> Path | None:
    """Where a model or dataset of the run config lies here, or None for one on the hub.

    Args:
        kind: ``models`` or ``datasets``.
        name: ``local/NAME`` means ``$MEDFED_HOME/KIND/NAME``, an absolute path means itself, and
            any other name is the hub's. Whether the folder exists is not looked at.
    """
    if name.startswith(LOCAL_PREFIX):
        return medfed_home() / kind / name.removeprefix(LOCAL_PREFIX)
    return Path(name) if Path(name).is_absolute() else None
