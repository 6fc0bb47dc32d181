"""The held-out loss: cards that no institution trains on, measured by the coordinator."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from app.adapter.layout import FlatArray, Manifest
from app.cards import tokens
from app.cards.dataset import resolve
from app.cards.exam_formats import with_answer_formats
from app.config import RunConfig
from app.seeds import derive
from app.training import loop
from app.training.device import place
from app.training.model import adapted_model, load_adapter, load_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel


class Holdout:
    """Cards that no institution trains on, in the forms that are trained, and a model for them."""

    def __init__(self, config: RunConfig, examples: list[tokens.Example]) -> None:
        self._config = config
        self._examples = examples

    @classmethod
    def load(cls, config: RunConfig) -> Holdout | None:
        """Read the held-out cards; None where the config or the dataset has none.

        Raises:
            AppError: if model or dataset cannot be loaded.
        """
        limit = config.evaluate.holdout_examples
        cards = resolve(config.dataset_name).holdout(limit) if limit else None
        if cards is None:
            return None
        cards = with_answer_formats(
            cards,
            seed=derive(config.train.seed, "formats", "holdout"),
            share=config.train.answer_formats,
        )
        tokenizer = load_tokenizer(config.model.name)
        return cls(config, tokens.tokenize(cards, tokenizer, config.train.seq_length))

    @property
    def examples(self) -> int:
        """Number of held-out cards."""
        return len(self._examples)

    def due(self, server_round: int) -> bool:
        """Whether the adapter of this round is to be measured; the last one always is."""
        last = server_round == self._config.num_rounds
        return last or server_round % self._config.evaluate.holdout_every_round == 0

    def loss(self, flat: FlatArray, manifest: Manifest) -> float:
        """Mean loss a labelled token, in nats, of the base model with adapter ``flat``."""
        load_adapter(self._model, flat, manifest)
        return loop.holdout_loss(self._model, self._examples)

    @cached_property
    def _model(self) -> PeftModel:
        """Loaded once a run: loading it takes longer than measuring a few cards."""
        return adapted_model(self._config.model, place({}))
