"""Sample packing: tokenized cards into rows without padding, grouped by the prefix they share.

Cards begin with the words of the template that they are put in. Each such prefix is computed once
for all cards of its group (``app.training.attention.SharedPrefix``), and the gradients of those
cards are summed before they go back through it. One dropout mask therefore falls on the prefix of a
whole group, instead of one for each card; each activation is dropped with the same probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from app.cards.tokens import Example


@dataclass(frozen=True)
class PackedBatch:
    """Several cards in one row of tokens, each without the shared prefix: one forward pass.

    Attributes:
        input_ids: shape (1, tokens), int64; each card without its last token, which predicts
            nothing.
        position_ids: shape (1, tokens), int64; in each card they count on from the prefix.
        lengths: tokens of each card in the row.
        predictors: shape (labels,), int64: where in the row a labelled token is predicted.
        labels: shape (labels,), int64: the tokens predicted there.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    predictors: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PrefixGroup:
    """Cards that share a prefix.

    Attributes:
        prefix: shape (1, tokens), int64; of no tokens where the cards share none. It ends before
            the position that predicts the first labelled token of any of the cards.
        batches: the cards, without the prefix.
    """

    prefix: Tensor
    batches: tuple[PackedBatch, ...]


def labelled_tokens(example: Example) -> int:
    """How many tokens of a card have a label: its answer, less a first token nothing precedes."""
    return max(0, len(example.input_ids) - max(1, example.prompt_length))


def pack(
    examples: Sequence[Example], max_tokens: int, prefix_pass_cost: int, device: torch.device
) -> list[PrefixGroup]:
    """Group cards by shared prefix and pack each group into batches.

    A card without a labelled token has no part in the loss and is left out.

    Args:
        examples: the cards, in any order.
        max_tokens: most tokens of a batch and its prefix together; a longer card gets a batch to
            itself.
        prefix_pass_cost: a prefix is shared only if that saves more than this many tokens.
        device: where the tensors go.
    """
    labelled = sorted((card for card in examples if labelled_tokens(card)), key=_before_answer)
    if not labelled:
        return []
    _, groups = _group_by_prefix(labelled, prefix_pass_cost)
    sharing = [group for group in groups if group[0]]
    alone = [card for prefix, cards in groups if not prefix for card in cards]
    return [
        PrefixGroup(
            prefix=torch.tensor([cards[0].input_ids[:prefix]], dtype=torch.int64, device=device),
            batches=tuple(_batches(cards, prefix, max_tokens, device)),
        )
        for prefix, cards in [*sharing, (0, alone)]
        if cards
    ]


def _before_answer(card: Example) -> tuple[int, ...]:
    """The tokens of a card whose next token has no label."""
    return card.input_ids[: max(1, card.prompt_length) - 1]


def _group_by_prefix(
    cards: list[Example], prefix_pass_cost: int
) -> tuple[int, list[tuple[int, list[Example]]]]:
    """Split sorted cards so that sharing prefixes saves the most tokens.

    Returns:
        The tokens saved, and for each group the length of its prefix and its cards.
    """
    # Of sorted cards, what the first and the last have in common is common to all.
    pairs = zip(_before_answer(cards[0]), _before_answer(cards[-1]), strict=False)
    prefix = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    saved, groups = prefix * (len(cards) - 1) - prefix_pass_cost, [(prefix, cards)]
    if saved <= 0:
        saved, groups = 0, [(0, cards)]
    if prefix == len(_before_answer(cards[-1])):
        return saved, groups
    parts = [
        _group_by_prefix(list(part), prefix_pass_cost)
        for _, part in groupby(cards, lambda card: _before_answer(card)[prefix : prefix + 1])
    ]
    apart = sum(part for part, _ in parts)
    if apart > saved:
        return apart, [group for _, part in parts for group in part]
    return saved, groups


def _batches(
    cards: list[Example], prefix: int, max_tokens: int, device: torch.device
) -> Iterator[PackedBatch]:
    """First-fit decreasing bin packing; the longest cards, and so peak memory, come first."""
    bins: list[list[Example]] = []
    rooms: list[int] = []
    for card in sorted(cards, key=lambda card: len(card.input_ids), reverse=True):
        tokens = len(card.input_ids) - 1 - prefix
        fits = next((number for number, room in enumerate(rooms) if tokens <= room), len(bins))
        if fits == len(bins):
            bins.append([])
            rooms.append(max_tokens - prefix)
        bins[fits].append(card)
        rooms[fits] -= tokens
    return (_packed_batch(cards, prefix, device) for cards in bins)


def _packed_batch(cards: Sequence[Example], prefix: int, device: torch.device) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for card in cards:
        start, end = len(ids) - prefix, len(card.input_ids) - 1
        first = max(1, card.prompt_length)
        ids += card.input_ids[prefix:end]
        positions += range(prefix, end)
        predictors += range(start + first - 1, start + end)
        labels += card.input_ids[first:]
        lengths.append(end - prefix)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return PackedBatch(
        input_ids=tensor(ids).unsqueeze(0),
        position_ids=tensor(positions).unsqueeze(0),
        lengths=tuple(lengths),
        predictors=tensor(predictors),
        labels=tensor(labels),
    )
