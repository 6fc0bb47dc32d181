"""A partition's cards: from the node's own folder, or cut from a dataset by flwr-datasets.

Both ways give the same rows in the same order for the same partition id: a folder written by
``medfed prepare`` is what ``partition`` returned, row by row.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from app.card_files import COLUMNS, SUFFIXES, card_files, read_cards
from app.cards import Example as Example
from app.cards import prompt_text as prompt_text
from app.cards import tokenize as tokenize
from app.errors import AppError
from app.places import local_folder

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from flwr_datasets import FederatedDataset

T = TypeVar("T")

# Share of the cards that no node gets where the dataset sets none aside itself (no test split).
HOLDOUT_SHARE = 0.02


def load_dataset_split(name: str, split: str) -> Dataset:
    """Return all cards of one split (``train`` or ``test``) of a dataset, in their own order.

    Args:
        name: ``local/NAME``, an absolute path to a folder with ``<split>.jsonl`` (or ``.csv``,
            ``.parquet``), or the name of a dataset on the hub.
        split: the split's name.

    Returns:
        Text columns instruction, input, output.

    Raises:
        AppError: the dataset or split does not exist, the hub cannot be reached, a row is
            malformed (with its file and line), or columns are missing.
    """
    found = _load_split(name, split)
    if found is None:
        raise AppError(
            f'expected a split "{split}" in the dataset {name}, found none',
            f"choose a dataset that has {split} data",
        )
    return found


def load_holdout(dataset_name: str, limit: int) -> Dataset | None:
    """Return up to ``limit`` cards of the dataset that ``partition`` gives to no node.

    They are the first of the ``test`` split. Of a dataset without one, ``HOLDOUT_SHARE`` of the
    cards are set aside before the rest is cut, the same ones for any number of partitions. A
    card that is also among those to train on is passed over.

    Returns:
        At least one card, or None if there is none (a dataset too small to set one aside).

    Raises:
        AppError: as ``load_dataset_split`` for the split ``train``.
    """
    federated = _federated_of(dataset_name, 1)
    trained = set(_rows(_only_cards(federated.load_split("train"), dataset_name)))
    test = _load_split(dataset_name, "test")
    if test is None:
        test = _only_cards(federated.load_split("test"), dataset_name)
    unseen = [i for i, row in enumerate(_rows(test)) if row not in trained]
    return test.select(unseen[:limit]) if unseen else None


def partition(dataset_name: str, num_partitions: int, partition_id: int) -> Dataset:
    """Cut one of ``num_partitions`` IID partitions out of a dataset's ``train`` split.

    Shuffle, seed and cut are flwr-datasets' own (``FederatedDataset`` with
    ``IidPartitioner``), so a local folder and the hub's copy of it give the same partitions.
    Of a dataset without a ``test`` split, some cards go to nobody (``load_holdout``).

    Raises:
        AppError: ``partition_id`` is outside 0..num_partitions-1, there are fewer cards than
            partitions, or as ``load_dataset_split``.
    """
    _check_partition(partition_id, num_partitions)
    federated = _federated_of(dataset_name, num_partitions)
    found = len(federated.load_split("train"))
    if found < num_partitions:
        raise AppError(
            f"expected at least {num_partitions} cards in {dataset_name} for as many partitions, "
            f"found {found}",
            "use fewer partitions or more data",
        )
    return _only_cards(federated.load_partition(partition_id), dataset_name)


def load_partition(node_config: Mapping[str, object], dataset_name: str) -> Dataset:
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
        _check_partition(*(_whole(node_config, key) for key in ("partition-id", "num-partitions")))
    if "data-path" in node_config:
        folder = Path(str(node_config["data-path"]))
        cards = _from_files(card_files(folder))
        if not len(cards):
            raise AppError(
                f"expected at least one card in {folder}, found none",
                "put the partition's cards there, or run `medfed prepare`",
            )
        return cards
    return partition(
        dataset_name, _whole(node_config, "num-partitions"), _whole(node_config, "partition-id")
    )


def digest(dataset: Dataset) -> str:
    """SHA-256 (hex) of the rows in order, as canonical JSON lines; other columns don't count."""
    sha = hashlib.sha256()
    for row in _rows(dataset):
        sha.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode())
        sha.update(b"\n")
    return sha.hexdigest()


def fingerprint(dataset: Dataset) -> int:
    """The first 53 bits of ``digest``: a number, as a reply may hold one, and exact in JSON."""
    return int(digest(dataset)[:14], 16) >> 3


def columns_of(dataset: Dataset) -> list[list[str]]:
    """The card columns, in the order of ``COLUMNS``, as plain lists read in one go."""
    rows: dict[str, list[str]] = dataset[:]
    return [rows[column] for column in COLUMNS]


def _rows(dataset: Dataset) -> Iterator[tuple[str, ...]]:
    return zip(*columns_of(dataset), strict=True)


def _check_partition(partition_id: int, num_partitions: int) -> None:
    if not 0 <= partition_id < num_partitions:
        raise AppError(
            f"expected a partition id from 0 to {num_partitions - 1}, found {partition_id}",
            "set partition-id in the SuperNode's node configuration to one of the roster's",
        )


def _whole(node_config: Mapping[str, object], key: str) -> int:
    value = node_config.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = ", ".join(node_config) or "nothing" if value is None else repr(value)
    raise AppError(
        f'expected a whole number "{key}" in the node configuration, found {found}',
        "start the SuperNode with data-path, or with both partition-id and num-partitions",
    )


def split_files(name: str, folder: Path, split: str) -> list[Path]:
    """The files of one split of a local dataset; empty if it lacks that split."""
    if not folder.is_dir():
        raise AppError(
            f"expected the dataset {name} in {folder}, found no such folder",
            "run `medfed prepare`, or name a dataset that exists",
        )
    return [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").is_file()]


def _version(files: list[Path]) -> tuple[tuple[str, int, int], ...]:
    return tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files)


def _load_split(name: str, split: str) -> Dataset | None:
    folder = local_folder("datasets", name)
    if folder is not None:
        files = split_files(name, folder, split)
        return _from_files(files) if files else None
    from datasets import load_dataset

    splits = _from_hub(name, lambda: load_dataset(name))
    return _only_cards(splits[split], name) if split in splits else None


def _from_files(files: list[Path]) -> Dataset:
    from datasets import Dataset, Features, Value

    cards = read_cards(files)
    columns = {column: [card[i] for card in cards] for i, column in enumerate(COLUMNS)}
    return Dataset.from_dict(columns, Features({column: Value("string") for column in COLUMNS}))


def _federated_of(name: str, num_partitions: int) -> FederatedDataset:
    folder = local_folder("datasets", name)
    files = (
        []
        if folder is None
        else [file for split in ("train", "test") for file in split_files(name, folder, split)]
    )
    return _federated(name, num_partitions, _version(files))


# One entry per dataset and cut: a process that serves several nodes shuffles once.
@lru_cache(maxsize=4)
def _federated(
    name: str, num_partitions: int, version: tuple[tuple[str, int, int], ...]
) -> FederatedDataset:
    """A prepared FederatedDataset; ``version`` renews it when local files change."""
    # flwr-datasets reports each load to its authors unless told otherwise before its import.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import IidPartitioner

    partitioners = {"train": IidPartitioner(num_partitions)}
    if local_folder("datasets", name) is None:
        federated = FederatedDataset(
            dataset=name, partitioners=partitioners, preprocessor=_with_test_split
        )
        _from_hub(name, lambda: federated.partitioners)
        return federated
    # Through Parquet, so that the builder has nothing left to guess, and in memory, so that no
    # copy of the cards stays in a cache and a read-only root is enough.
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "train.parquet"
        federated = FederatedDataset(
            dataset="parquet",
            partitioners=partitioners,
            preprocessor=_with_test_split if _load_split(name, "test") is None else None,
            data_files={"train": str(file)},
            cache_dir=scratch,
            keep_in_memory=True,
        )
        with _without_progress_bars():
            load_dataset_split(name, "train").to_parquet(file)
            _ = federated.partitioners  # reads the file while it is there
    return federated


def _with_test_split(splits: DatasetDict) -> DatasetDict:
    """Set some cards aside where the dataset has not done so (its rows are shuffled by now)."""
    if "test" in splits:
        return splits
    train = splits["train"]
    held = round(HOLDOUT_SHARE * len(train))
    divided = {"test": train.select(range(held)), "train": train.select(range(held, len(train)))}
    return type(splits)({**splits, **divided})


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """For work that is over in a second; a download from the hub keeps its bar."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _from_hub(name: str, load: Callable[[], T]) -> T:
    """Run ``load``, which fetches from the hub, and say in one line why it could not."""
    # Too many to import for one except clause (hub, HTTP client, builders), all of these kinds.
    try:
        return load()
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AppError(
            f"expected a dataset on the hub or this machine, found none for {name!r} ({reason})",
            "check the name and the network, or use local/hpo-flashcards after `medfed prepare`",
        ) from error


def _only_cards(dataset: Dataset, name: str) -> Dataset:
    """Leave the card columns, in the reference's order, with empty text for null."""
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
