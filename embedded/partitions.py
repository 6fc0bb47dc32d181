"""One folder per SuperNode: the cards that it, and no other, mounts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from common.files import write
from embedded import origin
from embedded.files import jsonl


def prepare(
    partitions: Path,
    dataset_name: str,
    ids: Mapping[str, int],
    done: Callable[[str, int], None] = lambda _name, _cards: None,
) -> bool:
    """Have ``partitions/NAME/train.jsonl`` for every SuperNode.

    The rows are those of the dataset's own partitions (``app.cards.dataset``), so a SuperNode with
    this folder trains on what it would have cut from the dataset itself.

    Args:
        partitions: ``$MEDFED_HOME/partitions``; ``ORIGIN.json`` goes there, beside the folders.
        dataset_name: as in the run config.
        ids: partition id, 0 to len(ids)-1, by SuperNode name.
        done: told of each folder and how many cards it holds.

    Returns:
        Whether anything had to be done.

    Raises:
        AppError: the dataset cannot be had, or has fewer cards than there are SuperNodes.
    """
    from app.cards.dataset import resolve

    dataset = resolve(dataset_name)
    facts = {
        "dataset": dataset_name,
        "source": [
            {"file": file, "size": size, "mtime_ns": changed}
            for file, size, changed in dataset.files(("train",))
        ],
        "partitions": dict(ids),
        "cut": "flwr-datasets IidPartitioner after a shuffle with seed 42 "
        "and, where there is no test split, 2 % set aside",
    }
    if origin.holds(partitions, facts):
        return False
    files = []
    for name, partition_id in ids.items():
        cards = dataset.partition(len(ids), partition_id)
        files.append(partitions / name / "train.jsonl")
        write(files[-1], jsonl(dict(card) for card in cards))
        done(name, len(cards))
    origin.record(partitions, facts, files)
    return True
