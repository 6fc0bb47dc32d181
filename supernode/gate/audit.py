"""The audit log: one JSON object a line, each with the SHA-256 of the line before it.

    log.jsonl    {"line": 7, "time": …, "event": …, …, "previous": SHA-256 of line 6}
    head.json    {"lines": 7, "sha256": SHA-256 of line 7}

Every line is on the disk before what it tells of happens. An edited, deleted, inserted or swapped
line breaks the chain at that place; a cut-off end is missed by the head. Whoever can write both
files can write both anew: a head that was noted somewhere else proves that this was not done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import SuperNodeError
from common.files import PRIVATE, write_or_say

LOG, HEAD = "log.jsonl", "head.json"
_NOTHING = "0" * 64  # what the first line has for the line before it


class BrokenChainError(SuperNodeError):
    """The log is not what was written.

    Args:
        line: the first line that is not, counted from 1.
        what: what was expected and what was found.
    """

    def __init__(self, path: Path, line: int, what: str) -> None:
        super().__init__(
            f"{path}:{line}: {what}",
            "keep the folder as it is for whoever looks into it; another one begins a new log",
        )
        self.line = line


@dataclass(frozen=True)
class Chain:
    """A log that was verified.

    Args:
        lines: how many there are.
        head: SHA-256 of the last one; 64 zeros if there is none.
        unfinished: bytes after the last whole line, as a crash leaves them; 0 if none.
    """

    lines: int
    head: str
    unfinished: int


def entries(folder: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log that ``verify`` found whole."""
    with (folder / LOG).open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                yield json.loads(line)


def verify(folder: Path, noted: str | None = None) -> Chain:
    """Follow the chain from its first line to its head.

    Args:
        folder: where the log is; a folder without one has a chain of no lines.
        noted: a head that was noted earlier, somewhere else: it must be one of the lines.

    Raises:
        BrokenChainError: naming the first line that is not as it was written.
        SuperNodeError: a file cannot be read.
    """
    path = folder / LOG
    content, told = _read(folder)
    *lines, rest = content.split(b"\n")
    claims = [_claim(path, number, line) for number, line in enumerate(lines, start=1)]
    digests = [_NOTHING, *(hashlib.sha256(line).hexdigest() for line in lines)]
    # Each line is written before the head: a crash between the two leaves the head one behind.
    if len(lines) - told[0] not in {0, 1}:
        at = min(len(lines), told[0]) + 1
        what = f"expected {told[0]} lines as {HEAD} says, found {len(lines)}"
        raise BrokenChainError(path, at, what)
    if told[0] == len(lines):
        claims.append(told[1])
    for number, claim in enumerate(claims):
        if claim != digests[number]:
            # Was that line changed, or what the next one says of it? Then nothing vouches for
            # the next one either.
            following = number + 1 < len(claims) and claims[number + 1] != digests[number + 1]
            changed = number + 1 if following or number == 0 else number
            raise BrokenChainError(path, changed, "expected the line as it was written")
    if digests[told[0]] != told[1]:
        raise BrokenChainError(folder / HEAD, 1, f"expected the SHA-256 of line {told[0]}")
    if noted is not None and noted not in digests[1:]:
        raise BrokenChainError(path, 1, f"expected a line with the noted head {noted}, found none")
    return Chain(len(lines), digests[-1], len(rest))


def _read(folder: Path) -> tuple[bytes, tuple[int, str]]:
    """The log's bytes and its head's lines and SHA-256, both of the same moment."""
    try:
        while True:
            head = _file(folder / HEAD)
            content = _file(folder / LOG)
            if _file(folder / HEAD) == head:
                break
        if not head:
            return content, (0, _NOTHING)
        told = json.loads(head)
        return content, (int(told["lines"]), str(told["sha256"]))
    except OSError as error:
        raise SuperNodeError(
            f"expected to read the audit log in {folder}, found: {error.strerror}"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise BrokenChainError(folder / HEAD, 1, "expected a head, found something else") from None


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _claim(path: Path, number: int, line: bytes) -> str:
    """What a line says of the one before it."""
    try:
        entry = json.loads(line)
        found, claim = entry["line"], str(entry["previous"])
    except (ValueError, KeyError, TypeError):
        raise BrokenChainError(path, number, "expected an entry, found something else") from None
    if found != number:
        raise BrokenChainError(path, number, f"expected line {number}, found line {found}")
    return claim


class AuditLog:
    """The log, open for this process alone.

    Args:
        folder: where it is; made if missing.
        clock: the time, UTC.

    Raises:
        SuperNodeError: another process writes it, it cannot be written, or its chain is broken.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._folder, self._clock, self._lock = folder, clock, threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(folder / LOG, flags, 0o600)
        except OSError as error:
            raise SuperNodeError(
                f"expected to write the audit log in {folder}, found: {error.strerror}",
                f"the folder must be writable by the user of the SuperNode (uid {os.getuid()})",
            ) from None
        try:
            self._begin()
        except BaseException:
            os.close(self._file)
            raise

    def _begin(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SuperNodeError(
                f"expected to be alone at {self._folder / LOG}, found that a SuperNode writes it",
                "one SuperNode, one audit log: give each its own site folder",
            ) from None
        chain = verify(self._folder)
        self._lines, self._head = chain.lines, chain.head
        if chain.unfinished:
            size = os.fstat(self._file).st_size - chain.unfinished
            # It was never whole, so nothing that it tells of has happened.
            os.truncate(self._file, size)
            self.append("recovered", unfinished_bytes=chain.unfinished)

    @property
    def head(self) -> str:
        """SHA-256 of the last line."""
        return self._head

    def append(self, event: str, **facts: Any) -> None:
        """Write one line, and return when it is on the disk.

        Raises:
            OSError: it could not be written; what it tells of must then not happen.
            SuperNodeError: the line was written, but the head was not.
        """
        with self._lock:
            self._append(event, facts)

    def _append(self, event: str, facts: dict[str, Any]) -> None:
        entry = {
            "line": self._lines + 1,
            "time": self._clock().isoformat(timespec="milliseconds"),
            "event": event,
            **{key.replace("_", "-"): value for key, value in facts.items()},
            "previous": self._head,
        }
        line = json.dumps(entry).encode()
        whole = line + b"\n"
        if os.write(self._file, whole) != len(whole):
            raise OSError("the disk is full")
        os.fsync(self._file)
        self._lines += 1
        self._head = hashlib.sha256(line).hexdigest()
        head = {"lines": self._lines, "sha256": self._head}
        write_or_say(self._folder / HEAD, json.dumps(head).encode(), PRIVATE, error=SuperNodeError)

    def close(self) -> None:
        """Let another process write it."""
        os.close(self._file)
