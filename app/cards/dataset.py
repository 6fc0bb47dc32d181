"""The dataset of a run, resolved once: a folder on this machine, or a name on the hub.

Nobody else decides what a dataset's name means. Whatever it is, it is then asked for its splits,
its partitions, the cards it holds out and what it consists of. Shuffle, seed and cut are
flwr-datasets' own (``FederatedDataset`` with ``IidPartitioner``), so a folder and the hub's copy of
it give the same partitions.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from app.cards.files import COLUMNS, SUFFIXES, read_cards
from app.cards.rows import only_cards, rows_of
from app.digests import folder_digest
from app.errors import AppError
from app.paths import local_folder

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from flwr_datasets import FederatedDataset

T = TypeVar("T")

# Share of the cards that no node gets where the dataset sets none aside itself (no test split).
HOLDOUT_SHARE = 0.02
SPLITS = ("train", "test")

# A file as it was: its path, its size in bytes and when it changed, in nanoseconds.
FileState = tuple[str, int, int]


def resolve(name: str) -> CardDataset:
    """The dataset that a run config names.

    Args:
        name: ``local/NAME`` or an absolute path is a folder with ``train.jsonl`` (or ``.csv``,
            ``.parquet``) and perhaps ``test.*``; any other name is a dataset on the hub. Whether
            it exists is found out when it is asked for cards.
    """
    folder = local_folder("datasets", name)
    return HubDataset(name) if folder is None else LocalDataset(name, folder)


class CardDataset(ABC):
    """Cards in splits, with the text columns instruction, input and output.

    Attributes:
        name: as in the run config.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def split(self, split: str) -> Dataset:
        """All cards of one split (``train`` or ``test``), in their own order.

        Raises:
            AppError: the dataset or split does not exist, the hub cannot be reached, a row is
                malformed (with its file and line), or columns are missing.
        """
        found = self._split(split)
        if found is None:
            raise AppError(
                f'expected a split "{split}" in the dataset {self.name}, found none',
                f"choose a dataset that has {split} data",
            )
        return found

    def partition(self, num_partitions: int, partition_id: int) -> Dataset:
        """One of ``num_partitions`` IID partitions of the ``train`` split.

        Of a dataset without a ``test`` split, some cards go to nobody (``holdout``).

        Raises:
            AppError: ``partition_id`` is outside 0..num_partitions-1, there are fewer cards than
                partitions, or as ``split``.
        """
        check_partition(partition_id, num_partitions)
        federated = self._federated(num_partitions)
        found = len(federated.load_split("train"))
        if found < num_partitions:
            raise AppError(
                f"expected at least {num_partitions} cards in {self.name} for as many partitions, "
                f"found {found}",
                "use fewer partitions or more data",
            )
        return only_cards(federated.load_partition(partition_id), self.name)

    def holdout(self, limit: int) -> Dataset | None:
        """Up to ``limit`` cards that ``partition`` gives to no node.

        They are the first of the ``test`` split. Of a dataset without one, ``HOLDOUT_SHARE`` of
        the cards are set aside before the rest is cut, the same ones for any number of
        partitions. A card that is also among those to train on is passed over.

        Returns:
            At least one card, or None if there is none (a dataset too small to set one aside).

        Raises:
            AppError: as ``split`` for the split ``train``.
        """
        federated = self._federated(1)
        trained = set(rows_of(only_cards(federated.load_split("train"), self.name)))
        test = self._split("test")
        if test is None:
            test = only_cards(federated.load_split("test"), self.name)
        unseen = [i for i, row in enumerate(rows_of(test)) if row not in trained]
        return test.select(unseen[:limit]) if unseen else None

    @abstractmethod
    def files(self, splits: Sequence[str] = SPLITS) -> tuple[FileState, ...]:
        """The files behind these splits; empty for the hub's, which go by their name."""

    @abstractmethod
    def origin(self) -> dict[str, str]:
        """Where the cards come from (``from``) and, for a folder that is there, its ``sha256``."""

    @abstractmethod
    def _split(self, split: str) -> Dataset | None:
        """``split``, or None where the dataset lacks it."""

    @abstractmethod
    def _federated(self, num_partitions: int) -> FederatedDataset:
        """flwr-datasets' view of this dataset."""


class LocalDataset(CardDataset):
    """A folder with ``train.jsonl`` (or ``.csv``, ``.parquet``) and perhaps ``test.*``."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self.folder = folder

    def files(self, splits: Sequence[str] = SPLITS) -> tuple[FileState, ...]:
        """See :class:`CardDataset`.

        Raises:
            AppError: there is no such folder.
        """
        found = [file for split in splits for file in self._files_of(split)]
        return tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in found)

    def origin(self) -> dict[str, str]:
        """See :class:`CardDataset`."""
        if not self.folder.is_dir():
            return {}
        return {"from": "folder", "sha256": folder_digest(self.folder)}

    def _files_of(self, split: str) -> list[Path]:
        if not self.folder.is_dir():
            raise AppError(
                f"expected the dataset {self.name} in {self.folder}, found no such folder",
                "run `medfed prepare`, or name a dataset that exists",
            )
        return [path for suffix in SUFFIXES if (path := self.folder / f"{split}{suffix}").is_file()]

    def _split(self, split: str) -> Dataset | None:
        files = self._files_of(split)
        return read(files) if files else None

    def _federated(self, num_partitions: int) -> FederatedDataset:
        return _local_federated(self.name, self.folder, num_partitions, self.files())


class HubDataset(CardDataset):
    """A dataset on the Hugging Face hub."""

    def files(self, splits: Sequence[str] = SPLITS) -> tuple[FileState, ...]:
        """See :class:`CardDataset`."""
        del splits
        return ()

    def origin(self) -> dict[str, str]:
        """See :class:`CardDataset`."""
        return {"from": "hub"}

    def _split(self, split: str) -> Dataset | None:
        from datasets import load_dataset

        splits = _from_hub(self.name, lambda: load_dataset(self.name))
        return only_cards(splits[split], self.name) if split in splits else None

    def _federated(self, num_partitions: int) -> FederatedDataset:
        return _hub_federated(self.name, num_partitions)


def check_partition(partition_id: int, num_partitions: int) -> None:
    """Check that there is such a partition.

    Raises:
        AppError: ``partition_id`` is outside 0..num_partitions-1.
    """
    if not 0 <= partition_id < num_partitions:
        raise AppError(
            f"expected a partition id from 0 to {num_partitions - 1}, found {partition_id}",
            "set partition-id in the SuperNode's node configuration to one of the roster's",
        )


def read(files: Sequence[Path]) -> Dataset:
    """The cards of these files, in the order given.

    Raises:
        AppError: a row cannot be used, with its file and line.
    """
    from datasets import Dataset, Features, Value

    cards = read_cards(files)
    columns = {column: [card[i] for card in cards] for i, column in enumerate(COLUMNS)}
    return Dataset.from_dict(columns, Features({column: Value("string") for column in COLUMNS}))


# One entry per dataset and cut: a process that serves several nodes shuffles once.
@lru_cache(maxsize=4)
def _local_federated(
    name: str, folder: Path, num_partitions: int, files: tuple[FileState, ...]
) -> FederatedDataset:
    """Prepared from a folder; ``files`` renews it when one of them changes."""
    del files
    dataset = LocalDataset(name, folder)
    # Through Parquet, so that the builder has nothing left to guess, and in memory, so that no
    # copy of the cards stays in a cache and a read-only root is enough.
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "train.parquet"
        federated = _federated(
            "parquet",
            num_partitions,
            preprocessor=_with_test_split if dataset._split("test") is None else None,
            data_files={"train": str(file)},
            cache_dir=scratch,
            keep_in_memory=True,
        )
        with _without_progress_bars():
            dataset.split("train").to_parquet(file)
            _ = federated.partitioners  # reads the file while it is there
    return federated


@lru_cache(maxsize=4)
def _hub_federated(name: str, num_partitions: int) -> FederatedDataset:
    federated = _federated(name, num_partitions, preprocessor=_with_test_split)
    _from_hub(name, lambda: federated.partitioners)
    return federated


def _federated(dataset: str, num_partitions: int, **options: object) -> FederatedDataset:
    # flwr-datasets reports each load to its authors unless told otherwise before its import.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import IidPartitioner

    partitioners = {"train": IidPartitioner(num_partitions)}
    return FederatedDataset(dataset=dataset, partitioners=partitioners, **options)


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
