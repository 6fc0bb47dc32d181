"""``policy.toml``: what one hospital lets run on its data, and what it lets leave.

    [reply]             what a reply to a round may hold; nothing else leaves
    [[fab]]             one for each approved FAB: its SHA-256, who approved it, when, and a note

It is read once, when the SuperNode starts. Whatever is wrong in it is said with file and line, and
then nothing starts: a gate that guesses is none.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tomli_w

from common.errors import SuperNodeError
from common.files import write_or_say

FILE_NAME = "policy.toml"
DTYPES = {"float16": 2, "float32": 4, "float64": 8}

_READABLE = 0o644  # no secret, and a SuperNode may run as another user

# The adapter of the reference entry: LoRA r=8 on q_proj and v_proj of SmolLM2-135M.
REFERENCE_PARAMETERS = 460_800
# What app/client_app.py says of a round.
REFERENCE_METRICS = (
    "num-examples",
    "train-loss",
    "train-seconds",
    "total-seconds",
    "partition-fingerprint",
    "peak-memory-bytes",
    "slice-memory-bytes",
    "threads",
)
# Room for names, metrics and headers around the array.
_ENVELOPE_BYTES = 65_536

_TEMPLATE = """\
# The site gate of {name}: what may run on this hospital's data, and what may leave.
# Read once, when the SuperNode starts. docs/site.md says what each line does.

[reply]
parameters = {parameters}     # the adapter: one flat array of exactly so many numbers
dtype = "float32"
max-norm = 1000.0       # the adapter's L2 norm
max-bytes = {max_bytes}     # everything in a reply together
metrics = [             # numbers that may leave under these names, and no others
{metrics}
]
error-text = false      # true: what an app says when it fails may leave, and may quote a record

# `medfed site approve FAB --by NAME` adds one of these for each FAB that may run:
# [[fab]]
# sha256 = "…"
# approved-by = "…"
# approved-at = 2026-01-31T12:00:00Z
# note = "…"
"""


@dataclass(frozen=True)
class ReplyLimits:
    """What a reply may hold.

    Args:
        parameters: how many numbers the adapter has, exactly.
        dtype: their type, a key of ``DTYPES``.
        max_norm: the adapter's largest L2 norm.
        max_bytes: bytes of a whole reply at most, as it travels.
        metrics: names of the numbers that may accompany it.
        error_text: whether the text of an app's error may leave.
    """

    parameters: int
    dtype: str
    max_norm: float
    max_bytes: int
    metrics: tuple[str, ...]
    error_text: bool = False


@dataclass(frozen=True)
class Approval:
    """One FAB that may run.

    Args:
        sha256: of the FAB's bytes, 64 lower-case hexadecimal digits.
        approved_by: who decided it.
        approved_at: when, UTC.
        note: why, or what was looked at; may be empty.
    """

    sha256: str
    approved_by: str
    approved_at: datetime
    note: str = ""


@dataclass(frozen=True)
class Policy:
    """A whole ``policy.toml``.

    Args:
        reply: what a reply may hold.
        approvals: FABs that may run, oldest line first.
        sha256: of the file, to be found again in the audit log.
    """

    reply: ReplyLimits
    approvals: tuple[Approval, ...]
    sha256: str

    def approval(self, sha256: str) -> Approval | None:
        """The approval of the FAB with this SHA-256; None if it may not run."""
        return next((one for one in self.approvals if one.sha256 == sha256), None)


def load(path: Path) -> Policy:
    """Read and check a policy.

    Raises:
        SuperNodeError: it is missing, or something in it is; with file and line where there is one.
    """
    content = _read(path)
    try:
        text = content.decode("utf-8")
        table = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SuperNodeError(
            f"{path}: expected TOML, found: {error}", "`medfed site init` writes one to start from"
        ) from None
    reader = _Reader(path, text)
    reader.only(table, {"reply", "fab"}, "")
    limits = reader.table(table, "reply")
    fabs = table.get("fab", [])
    if not isinstance(fabs, list) or not all(isinstance(one, dict) for one in fabs):
        raise reader.wrong("[fab]", "", "one [[fab]] for each approved FAB", fabs)
    policy = Policy(
        reply=_reply(reader, limits),
        approvals=tuple(_approval(reader, one, number) for number, one in enumerate(fabs)),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    seen: set[str] = set()
    for number, one in enumerate(policy.approvals):
        if one.sha256 in seen:
            raise reader.wrong(f"[[fab]] {number + 1}", "sha256", "each FAB once", one.sha256)
        seen.add(one.sha256)
    return policy


def create(path: Path, name: str, parameters: int = REFERENCE_PARAMETERS) -> None:
    """Write a strict policy that approves nothing yet.

    Raises:
        SuperNodeError: there is one already, or it cannot be written.
    """
    if path.exists():
        raise SuperNodeError(
            f"expected no policy at {path} yet, found one",
            "edit it, or move it away to begin with a new one",
        )
    text = _TEMPLATE.format(
        name=name,
        parameters=parameters,
        max_bytes=parameters * DTYPES["float32"] + _ENVELOPE_BYTES,
        metrics="\n".join(f'    "{metric}",' for metric in REFERENCE_METRICS),
    )
    write_or_say(path, text.encode("utf-8"), _READABLE, error=SuperNodeError)


def approve(path: Path, approval: Approval) -> bool:
    """Add an approval at the end of the file; whether it was not there yet.

    Raises:
        SuperNodeError: the policy has an error, or cannot be written.
    """
    if load(path).approval(approval.sha256) is not None:
        return False
    entry = {
        "sha256": approval.sha256,
        "approved-by": approval.approved_by,
        "approved-at": approval.approved_at,
        "note": approval.note,
    }
    added = tomli_w.dumps({"fab": [entry]}).encode("utf-8")
    write_or_say(
        path,
        _read(path).rstrip(b"\n") + b"\n\n" + added.lstrip(b"\n"),
        _READABLE,
        error=SuperNodeError,
    )
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SuperNodeError(
            f"expected this hospital's policy at {path}, found no such file",
            "`medfed site init` writes a strict one",
        ) from None
    except OSError as error:
        raise SuperNodeError(f"expected to read {path}, found: {error.strerror}") from None


def _reply(reader: _Reader, table: Mapping[str, Any]) -> ReplyLimits:
    where = "[reply]"
    keys = {"parameters", "dtype", "max-norm", "max-bytes", "metrics", "error-text"}
    reader.only(table, keys, where)
    limits = ReplyLimits(
        parameters=reader.value(table, where, "parameters", "a whole number above 0", _positive),
        dtype=reader.value(table, where, "dtype", " or ".join(DTYPES), lambda v: v in DTYPES),
        max_norm=float(
            reader.value(table, where, "max-norm", "a finite number above 0", _positive_number)
        ),
        max_bytes=reader.value(table, where, "max-bytes", "a whole number above 0", _positive),
        metrics=tuple(reader.value(table, where, "metrics", "a list of different names", _names)),
        error_text=reader.value(
            table, where, "error-text", "true or false", lambda v: isinstance(v, bool)
        ),
    )
    needed = limits.parameters * DTYPES[limits.dtype]
    if limits.max_bytes < needed:
        expected = f"at least the {needed} bytes of the adapter itself"
        raise reader.wrong(where, "max-bytes", expected, limits.max_bytes)
    return limits


def _approval(reader: _Reader, table: Mapping[str, Any], number: int) -> Approval:
    where = f"[[fab]] {number + 1}"
    reader.only(table, {"sha256", "approved-by", "approved-at", "note"}, where)
    at = reader.value(
        table,
        where,
        "approved-at",
        "a date and time with its zone, 2026-01-31T12:00:00Z",
        lambda v: isinstance(v, datetime) and v.tzinfo is not None,
    )
    return Approval(
        sha256=reader.value(table, where, "sha256", "64 lower-case hexadecimal digits", _sha256),
        approved_by=reader.value(
            table, where, "approved-by", "who decided it", lambda v: isinstance(v, str) and v != ""
        ),
        approved_at=at.astimezone(UTC),
        note=reader.value(table, where, "note", "a text", lambda v: isinstance(v, str))
        if "note" in table
        else "",
    )


def _positive(value: object) -> bool:
    return type(value) is int and value > 0


def _positive_number(value: object) -> bool:
    return type(value) in {int, float} and 0 < float(value) < math.inf  # type: ignore[arg-type]


def _names(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(name, str) and name != "" for name in value)
        and len(set(value)) == len(value)
    )


def _sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


class _Reader:
    """Takes values out of a policy and says where the wrong ones are."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._lines = path, text.splitlines()

    def table(self, table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        found = table.get(key)
        if not isinstance(found, dict):
            raise self.wrong(f"[{key}]", "", "such a table", found)
        return found

    def value(
        self,
        table: Mapping[str, Any],
        where: str,
        key: str,
        expected: str,
        good: Callable[[Any], bool],
    ) -> Any:
        if key not in table or not good(table[key]):
            raise self.wrong(where, key, expected, table.get(key))
        return table[key]

    def only(self, table: Mapping[str, Any], known: set[str], where: str) -> None:
        for key in table:
            if key not in known:
                expected = f"only {', '.join(sorted(known))}"
                raise self.wrong(where, key, expected, key)

    def wrong(self, where: str, key: str, expected: str, found: object) -> SuperNodeError:
        line = self._line(where, key)
        place = f"{self._path}:{line}" if line else str(self._path)
        name = " ".join(part for part in (where, key) if part)
        what = "nothing" if found is None else repr(found)
        return SuperNodeError(
            f"{place}: {name}: expected {expected}, found {what}", "docs/site.md describes each key"
        )

    def _line(self, where: str, key: str) -> int | None:
        """The line of ``key`` in the table ``where`` (``[[fab]] 2`` is the second of its kind)."""
        header, _, number = where.partition(" ")
        left = int(number or 1)
        inside = not header
        at = None
        for index, line in enumerate(self._lines, start=1):
            bare = line.split("#")[0].strip()
            if bare.startswith("["):
                if inside and header:
                    break
                inside = bare == header and (left := left - 1) == 0
                if inside:
                    at = index
            elif inside and re.match(rf'"?{re.escape(key)}"?\s*=', bare):
                return index
        return at
