"""The held-out loss: cards that no institution trains on, measured by the coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app import data, training
from app.adapter import FlatArray, Manifest
from app.config import RunConfig
from app.device import place
from app.model import attach_adapter, load_adapter, load_base, load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel


class Holdout:
    """The first cards of the dataset's test split and a model to measure adapters on them."""

    def __init__(self, config: RunConfig, examples: list[data.Example]) -> None:
        self._config = config
        self._examples = examples
        self._model: PeftModel | None = None

    @classmethod
    def load(cls, config: RunConfig) -> Holdout | None:
        """Read the held-out cards; None where the config or the dataset has none.

        Raises:
            AppError: if model or dataset cannot be loaded.
        """
        limit = config.evaluate.holdout_examples
        cards = data.load_holdout(config.dataset_name, limit) if limit else None
        if cards is None:
            return None
        tokenizer = load_tokenizer(config.model.name)
        return cls(config, data.tokenize(cards, tokenizer, config.train.seq_length))

    @property
    def examples(self) -> int:
        """Number of held-out cards."""
        return len(self._examples)

    def loss(self, flat: FlatArray, manifest: Manifest) -> float:
        """Mean loss a labelled token, in nats, of the base model with adapter ``flat``."""
        if self._model is None:
            base = load_base(self._config.model, place({}))
            self._model = attach_adapter(base, self._config.model)
        load_adapter(self._model, flat, manifest)
        return training.holdout_loss(self._model, self._examples)
