"""A tokenizer of SmolLM2's kind, small enough to train in a test."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from app.cards.tokens import card_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEXTS = [
    card_text("What is fever?", "Fever is a body temperature above normal."),
    card_text("What are the symptoms of anemia?", "Fatigue, weakness and pale skin."),
]


@lru_cache
def tiny_tokenizer(*, whole_template: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on two cards; any text survives encoding and decoding.

    Args:
        whole_template: take the whole response template for one token.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS * 50, trainer)
    if whole_template:
        tokenizer.add_tokens(["\n### Response:"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[2]
    )
