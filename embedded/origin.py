"""``ORIGIN.json``: where prepared files come from, under which licence, and whether they are whole.

Each file is recorded by digest, size and time. Size and time answer at once whether anything
changed; only where they differ (a copied folder) are the bytes hashed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import files
from embedded.files import replace_folder, scratch_folder

NAME = "ORIGIN.json"


def prepare(place: Path, facts: Mapping[str, object], make: Callable[[Path], Path]) -> bool:
    """Have a folder whose record says ``facts`` at ``place``: whole, or not at all.

    Args:
        place: the folder.
        facts: what is recorded of it; other facts are another folder, which is made anew.
        make: is given an empty folder and returns a folder in it that holds the files.

    Returns:
        Whether anything had to be done.
    """
    if holds(place, facts):
        return False
    with scratch_folder(place) as scratch:
        if holds(place, facts):  # another process was at it
            return False
        made = make(scratch)
        record(made, facts, sorted(made.iterdir()))
        replace_folder(made, place)
    return True


def record(folder: Path, facts: Mapping[str, object], recorded: Sequence[Path]) -> None:
    """Write ``folder/ORIGIN.json``: the facts, then every file of ``recorded`` (within it)."""
    seen = {
        file.relative_to(folder).as_posix(): {**_stamp(file), "sha256": files.sha256(file)}
        for file in recorded
    }
    _write(folder, {**facts, "files": seen})


def read(folder: Path) -> dict[str, Any] | None:
    """What was recorded, or None if nothing (readable) was."""
    try:
        recorded = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return recorded if isinstance(recorded, dict) else None


def holds(folder: Path, facts: Mapping[str, object]) -> bool:
    """Whether the record says ``facts`` and every recorded file is there, unchanged."""
    recorded = read(folder)
    if recorded is None or not isinstance(recorded.get("files"), dict):
        return False
    if any(recorded.get(key) != value for key, value in facts.items()):
        return False
    moved = False
    for name, known in recorded["files"].items():
        file = folder / name
        try:
            stamp = _stamp(file)
            if any(known[key] != value for key, value in stamp.items()):
                if known["sha256"] != files.sha256(file):
                    return False
                known |= stamp
                moved = True
        except (OSError, KeyError, TypeError):
            return False
    if moved:
        with suppress(OSError):  # a read-only copy is hashed each time instead
            _write(folder, recorded)
    return True


def _stamp(file: Path) -> dict[str, int]:
    found = file.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _write(folder: Path, recorded: Mapping[str, object]) -> None:
    files.write(folder / NAME, json.dumps(recorded, indent=2, ensure_ascii=False).encode() + b"\n")
