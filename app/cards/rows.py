"""Rows of cards: their three columns, and what makes two lists of them the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from app.cards.files import COLUMNS
from app.errors import AppError

if TYPE_CHECKING:
    from datasets import Dataset


def columns_of(dataset: Dataset) -> list[list[str]]:
    """The card columns, in the order of ``COLUMNS``, as plain lists read in one go."""
    rows: dict[str, list[str]] = dataset[:]
    return [rows[column] for column in COLUMNS]


def rows_of(dataset: Dataset) -> Iterator[tuple[str, ...]]:
    """Every card in order, as (instruction, input, output)."""
    return zip(*columns_of(dataset), strict=True)


def digest(dataset: Dataset) -> str:
    """SHA-256 (hex) of the rows in order, as canonical JSON lines; other columns don't count."""
    sha = hashlib.sha256()
    for row in rows_of(dataset):
        sha.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode())
        sha.update(b"\n")
    return sha.hexdigest()


def fingerprint(dataset: Dataset) -> int:
    """The first 53 bits of ``digest``: a number, as a reply may hold one, and exact in JSON."""
    return int(digest(dataset)[:14], 16) >> 3


def only_cards(dataset: Dataset, name: str) -> Dataset:
    """Leave the card columns, in the reference's order, with empty text for null.

    Raises:
        AppError: a column is missing or holds something other than text.
    """
    missing = [column for column in COLUMNS if column not in dataset.column_names]
    if missing:
        raise AppError(
            f"expected the columns {', '.join(COLUMNS)} in {name}, "
            f"found {', '.join(dataset.column_names)}",
            "choose a dataset in the reference schema, or rename its columns",
        )
    cards = dataset.select_columns(list(COLUMNS))
    for column in COLUMNS:
        dtype = getattr(cards.features[column], "dtype", "nested")
        if dtype not in ("string", "large_string", "null"):
            raise AppError(
                f'expected text in the column "{column}" of {name}, found {dtype}',
                "choose a dataset in the reference schema, or convert that column to text",
            )
    if any(cards.data.column(column).null_count for column in COLUMNS):
        return cards.map(
            lambda row: {column: row[column] or "" for column in COLUMNS}, keep_in_memory=True
        )
    return cards
