"""Reading and writing keys and certificates: whole files only, private ones 0600."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from .errors import CertsError

PRIVATE, PUBLIC = 0o600, 0o644


def make_folder(folder: Path) -> None:
    """Make ``folder`` if it is missing, for its owner only (0700).

    Raises:
        CertsError: it cannot be made, or is a file.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CertsError(
            f"expected to make the folder {folder}, found: {error.strerror}",
            "choose a folder that you may write to: MEDFED_HOME",
        ) from None


def write(path: Path, content: bytes, mode: int) -> None:
    """Write a whole file or nothing: a reader sees the old one or the new one.

    Raises:
        CertsError: the folder cannot be written to.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:  # mkstemp made it 0600
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).chmod(mode)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CertsError(
            f"expected to write {path}, found: {error.strerror}",
            f"the folder must be writable by this user (uid {os.getuid()})",
        ) from None


def read(path: Path) -> bytes | None:
    """The file's content; None if there is no such file.

    Raises:
        CertsError: it is there but cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CertsError(
            f"expected to read {path}, found: {error.strerror}",
            f"it must be readable by this user (uid {os.getuid()})",
        ) from None


def read_private(path: Path) -> bytes | None:
    """As ``read``, for a file that nobody but its owner may have access to.

    Raises:
        CertsError: it cannot be read, or others may read or write it.
    """
    content = read(path)
    if content is not None and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
        raise CertsError(
            f"expected {path} to be its owner's only (0600), found {mode:04o}",
            f"chmod 600 {path}, and if others could have read it, delete it and issue a new one",
        )
    return content


def check_name(name: str) -> None:
    """Check that a SuperNode's name can be a file's.

    Raises:
        CertsError: it cannot.
    """
    if not name or not name.isascii() or name in {".", ".."} or set(name) & set("/\\ \t\r\n"):
        raise CertsError(
            f"expected a SuperNode's name that can be a file's, found {name!r}",
            "letters, digits and '-', for example supernode-07",
        )
