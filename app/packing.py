"""Cards laid end to end: no padding, and attention that never crosses a card's border.

transformers calls attention through a registry, so a model of any architecture that uses it runs on
packs without a change to its code. Each card is attended to by itself with the causal kernel,
which keeps no mask and no matrix of scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from app.errors import AppError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from app.cards import Example

PACKED_ATTENTION = "medfed_packed"


@dataclass(frozen=True)
class Pack:
    """Several cards in one row of tokens.

    Attributes:
        input_ids: shape (1, tokens), int64; each card without its last token, which predicts
            nothing.
        position_ids: shape (1, tokens), int64; starts at 0 for each card.
        lengths: tokens of each card in the pack.
        predictors: shape (labels,), int64: where in the pack a labelled token is predicted.
        labels: shape (labels,), int64: the tokens predicted there.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    predictors: Tensor
    labels: Tensor


def labelled_tokens(example: Example) -> int:
    """How many tokens of a card have a label: its answer, less a first token nothing precedes."""
    return max(0, len(example.input_ids) - max(1, example.prompt_length))


def pack(examples: Sequence[Example], max_tokens: int, device: torch.device) -> list[Pack]:
    """Lay cards end to end in as few packs of at most `max_tokens` tokens as first-fit finds.

    Longest first, so that the first pack is the one that needs the most memory. A card longer than
    `max_tokens` gets a pack to itself; a card without any labelled token has no part in the loss
    and is left out.
    """
    labelled = [example for example in examples if labelled_tokens(example)]
    bins: list[list[Example]] = []
    rooms: list[int] = []
    for example in sorted(labelled, key=lambda card: len(card.input_ids), reverse=True):
        tokens = len(example.input_ids) - 1
        fits = next((number for number, room in enumerate(rooms) if tokens <= room), len(bins))
        if fits == len(bins):
            bins.append([])
            rooms.append(max_tokens)
        bins[fits].append(example)
        rooms[fits] -= tokens
    return [_lay_end_to_end(cards, device) for cards in bins]


def _lay_end_to_end(examples: Sequence[Example], device: torch.device) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for example in examples:
        start, tokens = len(ids), len(example.input_ids) - 1
        first = max(1, example.prompt_length)
        ids += example.input_ids[:-1]
        positions += range(tokens)
        predictors += range(start + first - 1, start + tokens)
        labels += example.input_ids[first:]
        lengths.append(tokens)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Pack(
        input_ids=tensor(ids).unsqueeze(0),
        position_ids=tensor(positions).unsqueeze(0),
        lengths=tuple(lengths),
        predictors=tensor(predictors),
        labels=tensor(labels),
    )


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_lengths: tuple[int, ...],
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each card: (1, heads, tokens, dim) to (1, tokens, heads, dim)."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise AppError(
                f"expected plain softmax attention, found {name} in {type(module).__name__}",
                "train a model whose attention is the usual one (Llama, Mistral, Qwen2, ...)",
            )
    window = options.get("sliding_window")
    if window is not None and max(packed_lengths) > window:
        raise AppError(
            f"expected cards within the attention window of {window} tokens, "
            f"found one of {max(packed_lengths)}",
            f"set train.seq-length to at most {window}",
        )
    grouped = query.shape[1] != key.shape[1]
    cards = zip(
        query.split(packed_lengths, dim=2),
        key.split(packed_lengths, dim=2),
        value.split(packed_lengths, dim=2),
        strict=True,
    )
    attended = [
        scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        ).transpose(1, 2)
        for q, k, v in cards
    ]
    return torch.cat(attended, dim=1), None


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend within packs, and give it its own attention back afterwards.

    Raises:
        AppError: the architecture does not call attention through the registry.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(PACKED_ATTENTION)
    if model.config._attn_implementation != PACKED_ATTENTION:
        raise AppError(
            f"expected a model whose attention can be chosen, found {type(model).__name__}",
            "use an architecture with transformers' attention interface (Llama, Mistral, ...)",
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)
