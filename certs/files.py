"""Reading and writing keys and certificates: whole files only, private ones 0600."""

from __future__ import annotations

from pathlib import Path

from common import files
from common.errors import CertsError
from common.files import PRIVATE as PRIVATE
from common.files import PUBLIC as PUBLIC


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
    files.write_or_say(path, content, mode, error=CertsError)


def read(path: Path) -> bytes | None:
    """The file's content; None if there is no such file.

    Raises:
        CertsError: it is there but cannot be read.
    """
    return files.read(path, CertsError)


def read_private(path: Path) -> bytes | None:
    """As ``read``, for a file that nobody but its owner may have access to.

    Raises:
        CertsError: it cannot be read, or others may read or write it.
    """
    content = read(path)
    if content is not None:
        hint = f"chmod 600 {path}, and if others could have read it, delete it and issue a new one"
        files.check_private(path, CertsError, hint)
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
