"""The held-out loss: cards that no institution trains on, measured by the coordinator."""

from __future__ import annotations

from app import data, training
from app.adapter import FlatArray, Manifest
from app.config import RunConfig
from app.device import place
from app.model import adapted_model, load_adapter, load_tokenizer


class Holdout:
    """The first cards of the dataset's test split and a model to measure adapters on them."""

    def __init__(self, config: RunConfig, examples: list[data.Example]) -> None:
        self._config = config
        self._examples = examples
        self._placement = place({})

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
        model = adapted_model(self._config.model, self._placement)
        load_adapter(model, flat, manifest)
        return training.holdout_loss(model, self._examples)
