"""Files that are there whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

PRIVATE, PUBLIC = 0o600, 0o644


def write(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file so that a reader sees the old one or all of the new one.

    Args:
        path: the file; its folder is made if it is missing.
        content: all of it.
        mode: of the file; None: what the umask leaves of 0666.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, mode) as draft, draft.open("wb") as stream:
        stream.write(content)


def write_or_say(
    path: Path, content: bytes, mode: int | None = None, *, error: type[UserError]
) -> None:
    """As :func:`write`, and say what is wrong with the folder where that fails.

    Raises:
        UserError: the given kind of it, in place of an ``OSError``.
    """
    try:
        write(path, content, mode)
    except OSError as failed:
        raise error(
            f"expected to write {path}, found: {failed.strerror}",
            f"the folder must be writable by this user (uid {os.getuid()}) and not full",
        ) from None


@contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A draft beside ``path`` that takes its place, synced, when the block ends without an error.

    Args:
        path: the file to be.
        mode: as for :func:`write`; it is the draft's from the beginning.
    """
    draft = path.with_name(f".{path.name}.partial")
    lock = _own(draft, 0o666 if mode is None else mode)
    try:
        if mode is not None:
            draft.chmod(mode)  # whatever the umask is
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
        sync_folder(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)  # for a forked child too, which has it open as well
        os.close(lock)


def _own(draft: Path, mode: int) -> int:
    """Make the draft and lock it: whoever else writes the same file waits until it is done.

    A lock holds across containers that share a volume, where ids of processes do not tell writers
    apart, and ends with its process: a draft that is not locked was left by one that was killed.

    Returns:
        The descriptor that holds the lock.
    """
    while True:
        try:
            lock, made = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), True
        except FileExistsError:
            try:
                lock, made = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW), False
            except FileNotFoundError:
                continue  # its writer has finished since
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(draft, lock):  # else it was renamed or removed while this waited
                if made:
                    return lock
                draft.unlink()
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` as durable as their contents."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, error: type[UserError]) -> bytes | None:
    """The file's content; None if there is no such file.

    Raises:
        UserError: the given kind of it: the file is there but cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as failed:
        raise error(
            f"expected to read {path}, found: {failed.strerror}",
            f"it must be readable by this user (uid {os.getuid()})",
        ) from None


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_private(path: Path, error: type[UserError], hint: str) -> None:
    """Check that nobody but its owner may read or write a file.

    Raises:
        UserError: the given kind of it, with ``hint``.
        OSError: the file cannot be looked at.
    """
    if (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise error(f"expected {path} to be its owner's only (0600), found {mode:04o}", hint)
