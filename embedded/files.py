"""Files that are either whole or absent."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from common.files import sync_folder


def jsonl(rows: Iterable[Mapping[str, object]]) -> bytes:
    """Rows as JSON Lines in UTF-8; the same rows always give the same bytes."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """An empty folder on the same file system as ``beside``, gone at the end unless moved away.

    One process at a time: another one waits, and then finds the work done. What a killed process
    left is swept up by the next.
    """
    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = beside.with_name(f".{beside.name}.preparing")
    with beside.with_name(f".{beside.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def replace_folder(new: Path, place: Path) -> None:
    """Put the folder ``new`` where ``place`` is, whole, in place of what was there."""
    for file in new.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    sync_folder(new)
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    sync_folder(place.parent)
    shutil.rmtree(old, ignore_errors=True)
