"""What a person looks at before approving a FAB: its files, and what changed."""

from __future__ import annotations

import difflib
import io
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping

from common.errors import SuperNodeError

# Flower refuses larger FABs than 10 MB; no honest one unpacks to more than this.
_UNPACKED_BYTES = 100_000_000


def unpack(fab: bytes, where: object) -> dict[str, bytes]:
    """The files of a FAB by name, in the order of their names.

    Raises:
        SuperNodeError: it is not a FAB, or is made to hide or to swamp something.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(fab)) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise _no_fab(where, "a file that is in it twice")
            if sum(info.file_size for info in archive.infolist()) > _UNPACKED_BYTES:
                raise _no_fab(where, f"more than {_UNPACKED_BYTES} bytes when unpacked")
            files = {name: archive.read(name) for name in sorted(names)}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise _no_fab(where, str(error)) from None
    if "pyproject.toml" not in files:
        raise _no_fab(where, "no pyproject.toml in it")
    return files


def _no_fab(where: object, found: str) -> SuperNodeError:
    return SuperNodeError(
        f"expected a Flower App Bundle in {where}, found {found}", "`flwr build` makes one"
    )


def difference(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> Iterator[str]:
    """The unified difference of two FABs' files, line by line, as a reviewer should read it."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        titles = (
            f"a/{visible(name)}" if before is not None else "/dev/null",
            f"b/{visible(name)}" if after is not None else "/dev/null",
        )
        lines = (_lines(before), _lines(after))
        yield from difflib.unified_diff(*lines, *titles, lineterm="")


def _lines(content: bytes | None) -> list[str]:
    return [] if content is None else [visible(line) for line in text(content).split("\n")]


def text(content: bytes) -> str:
    """A file's content; bytes that are no text are shown as such."""
    return content.decode("utf-8", errors="backslashreplace")


def visible(line: str) -> str:
    """One line with everything made visible that could make a terminal show something else.

    Control characters move the cursor and erase; characters of direction reorder code on screen.
    """
    return "".join(
        character
        if character == "\t" or unicodedata.category(character) not in {"Cc", "Cf", "Zl", "Zp"}
        else character.encode("unicode_escape").decode("ascii")
        for character in line
    )
