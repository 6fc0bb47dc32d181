"""Where the app finds what this machine keeps: one folder, ``$MEDFED_HOME``."""

from __future__ import annotations

import os
from pathlib import Path

from app.errors import AppError

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


def model_folder(name: str) -> Path | None:
    """Where a model of the run config lies here, or None for one on the hub.

    One never stands in for another.

    Raises:
        AppError: it should be on this machine, and its folder holds no model.
    """
    folder = local_folder("models", name)
    if folder is not None and not (folder / "config.json").is_file():
        raise AppError(
            f"model.name: expected a model in {folder}, found no config.json",
            "medfed prepare fetches the embedded model; other models are folders that "
            "transformers' save_pretrained wrote",
        )
    return folder
