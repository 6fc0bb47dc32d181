"""Reading cards (instruction, input, output) from files that a hospital wrote by hand or exported.

The readers are strict and slow to guess: a value that is not text is refused with its file and
line, where a general table reader would turn "007" into 7, "None" into nothing and a column of
dates into timestamps. What they accept, they return unchanged.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from app.errors import AppError

COLUMNS = ("instruction", "input", "output")
SUFFIXES = (".jsonl", ".csv", ".parquet")
SCHEMA_HINT = (
    "every row needs the columns instruction, input and output, each of them text; "
    "`medfed data check PATH` lists every row that cannot be used"
)


class Card(NamedTuple):
    """One question with its answer, in the reference schema."""

    instruction: str
    input: str
    output: str


class Located(NamedTuple):
    """A card and the place it was read from."""

    card: Card
    file: Path
    line: int


class BadRow(NamedTuple):
    """A row that cannot be used, where it stands, and why."""

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        """As a compiler prints it: ``file:line: reason``."""
        return f"{self.file}:{self.line}: {self.reason}"

    def error(self) -> AppError:
        """The same as an error for whoever has to stop here."""
        return AppError(str(self), SCHEMA_HINT)


def card_files(folder: Path) -> list[Path]:
    """Return the card files directly in ``folder``, sorted by name.

    Raises:
        AppError: the folder is missing, unreadable or holds no card file.
    """
    wanted = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
    hint = "give a folder with at least one such file, or run `medfed prepare`"
    if not folder.is_dir():
        raise AppError(f"expected a folder with {wanted} at {folder}, found none", hint)
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    except PermissionError as error:
        raise AppError(f"cannot read the folder {folder}: permission denied", hint) from error
    if not files:
        raise AppError(f"expected {wanted} in {folder}, found no such file", hint)
    return files


def read_cards(files: Sequence[Path]) -> list[Card]:
    """Read every card of ``files``, in the order given.

    Raises:
        AppError: the first row or file that cannot be used, as ``file:line: reason``.
    """
    cards: list[Card] = []
    for found in scan(files):
        if isinstance(found, BadRow):
            raise found.error()
        cards.append(found.card)
    return cards


def scan(files: Sequence[Path]) -> Iterator[Located | BadRow]:
    """Yield every row of ``files`` in order, good or bad, so that a check can list all bad ones.

    ``line`` is 1-based: the line a row begins on in JSONL and CSV, the row number in Parquet.

    Raises:
        AppError: a file cannot be opened, or its suffix is not one of ``SUFFIXES``.
    """
    readers = {".jsonl": _scan_jsonl, ".csv": _scan_csv, ".parquet": _scan_parquet}
    for file in files:
        reader = readers.get(file.suffix)
        if reader is None:
            raise AppError(
                f"expected a file ending in {', '.join(SUFFIXES)}, found {file}",
                "export the cards as JSON Lines, CSV or Parquet",
            )
        try:
            yield from reader(file)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise AppError(f"cannot read {file}: {reason}", "check its permissions") from error


def _scan_jsonl(file: Path) -> Iterator[Located | BadRow]:
    with file.open("rb") as lines:
        # Only "\n" ends a row: text may hold U+2028 and the other separators of str.splitlines().
        for line, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            try:
                # A first line saved by a spreadsheet begins with a byte order mark.
                row = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
            except UnicodeDecodeError:
                yield BadRow(file, line, "expected UTF-8, found other bytes")
            except (json.JSONDecodeError, RecursionError) as error:
                what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
                yield BadRow(file, line, f"expected one JSON object, found malformed JSON ({what})")
            else:
                yield _check(row, file, line)


def _scan_csv(file: Path) -> Iterator[Located | BadRow]:
    with file.open("r", encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, strict=True)
        line = 1
        try:
            header = next(rows, [])
            missing = _missing(header)
            if missing:
                yield BadRow(file, line, missing)
                return
            while True:
                line = rows.line_num + 1
                fields = next(rows, None)
                if fields is None:
                    return
                if not fields:
                    continue
                if len(fields) != len(header):
                    reason = f"expected {len(header)} fields as in the header, found {len(fields)}"
                    yield BadRow(file, line, reason)
                else:
                    yield _check(dict(zip(header, fields, strict=True)), file, line)
        except csv.Error as error:
            # Where a quote is never closed, no later row can be told from its text.
            yield BadRow(file, line, f"expected well-formed CSV, found an error ({error})")
        except UnicodeDecodeError:
            # The decoder works ahead in blocks, so only the bytes themselves tell the line.
            yield BadRow(file, _first_line_not_utf8(file), "expected UTF-8, found other bytes")


def _scan_parquet(file: Path) -> Iterator[Located | BadRow]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(file) as table:
            missing = _missing(table.schema_arrow.names)
            if missing:
                yield BadRow(file, 1, missing)
                return
            row = 0
            for batch in table.iter_batches(columns=list(COLUMNS)):
                for values in batch.to_pylist():
                    row += 1
                    yield _check(values, file, row)
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        yield BadRow(file, 1, f"expected a Parquet file, found an unreadable one ({reason})")


def _check(row: object, file: Path, line: int) -> Located | BadRow:
    if not isinstance(row, dict):
        return BadRow(file, line, f"expected one JSON object, found {_kind(row)}")
    missing = _missing(list(row))
    if missing:
        return BadRow(file, line, missing)
    for column in COLUMNS:
        value = row[column]
        if not isinstance(value, str):
            return BadRow(file, line, f'expected text in "{column}", found {_kind(value)}')
        try:
            value.encode()
        except UnicodeEncodeError:
            return BadRow(file, line, f'expected text in "{column}", found half a surrogate pair')
    return Located(Card(*(row[column] for column in COLUMNS)), file, line)


def _missing(found: Sequence[str]) -> str:
    if all(column in found for column in COLUMNS):
        return ""
    return f"expected the columns {', '.join(COLUMNS)}, found {', '.join(found) or 'none'}"


def _kind(value: object) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    if value is None:
        return "nothing (null)"
    return kinds.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _first_line_not_utf8(file: Path) -> int:
    with file.open("rb") as lines:
        for line, raw in enumerate(lines, start=1):
            try:
                raw.decode()
            except UnicodeDecodeError:
                return line
    return 1
