"""The cards of one node: those in its own folder, or its partition of the run's dataset.

Both ways give the same rows in the same order for the same partition id: a folder written by
``medfed prepare`` is what ``CardDataset.partition`` returned, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from app.cards.dataset import check_partition, read, resolve
from app.cards.files import card_files
from app.errors import AppError

if TYPE_CHECKING:
    from datasets import Dataset


def cards_of_node(node_config: Mapping[str, object], dataset_name: str) -> Dataset:
    """Return the cards that this node trains on.

    Args:
        node_config: the SuperNode's own configuration. With ``data-path``, the cards are those
            of every JSONL, CSV and Parquet file in that folder, by file name; without it, they
            are cut from ``dataset_name`` by ``partition-id`` and ``num-partitions``.
        dataset_name: what the run trains on; unused where the node has its own folder.

    Raises:
        AppError: a key is missing or not a whole number, the partition id is out of range, the
            folder is missing or holds no cards, a row is malformed (with file and line).
    """
    if "partition-id" in node_config and "num-partitions" in node_config:
        check_partition(*(_whole(node_config, key) for key in ("partition-id", "num-partitions")))
    if "data-path" in node_config:
        folder = Path(str(node_config["data-path"]))
        cards = read(card_files(folder))
        if not len(cards):
            raise AppError(
                f"expected at least one card in {folder}, found none",
                "put the partition's cards there, or run `medfed prepare`",
            )
        return cards
    num_partitions = _whole(node_config, "num-partitions")
    return resolve(dataset_name).partition(num_partitions, _whole(node_config, "partition-id"))


def _whole(node_config: Mapping[str, object], key: str) -> int:
    value = node_config.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = ", ".join(node_config) or "nothing" if value is None else repr(value)
    raise AppError(
        f'expected a whole number "{key}" in the node configuration, found {found}',
        "start the SuperNode with data-path, or with both partition-id and num-partitions",
    )
