"""Files that are there whole or not at all, and what a disk says when it cannot take them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import AppError


def write(file: Path, content: bytes) -> None:
    """Put ``content`` into ``file``: beside its place first, synced, then renamed.

    Raises:
        AppError: the disk is full or cannot be written; ``file`` is as it was.
    """
    partial = file.with_name(f".{file.name}.partial")
    with disk(file):
        try:
            with partial.open("wb") as written:
                written.write(content)
                written.flush()
                os.fsync(written.fileno())
            partial.replace(file)
            sync_folder(file.parent)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` as durable as their contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk(place: Path) -> Iterator[None]:
    """Say what is wrong with the disk under ``place`` in words that can be acted on.

    Raises:
        AppError: for every ``OSError`` inside the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = next(parent for parent in place.parents if parent.is_dir())
            free = shutil.disk_usage(folder).free / 2**20
            found, hint = f"a full disk ({free:.1f} MB free)", "free some space"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            found, hint = "a volume that cannot be written", "mount it writable for this user"
        else:
            found, hint = str(error.strerror or error), "check the disk"
        raise AppError(
            f"expected to write {place}, found {found}",
            f"{hint}; nothing was overwritten, and medfed run --resume goes on from the last "
            "whole round",
        ) from error
