"""Cards laid end to end: no padding, no card's border crossed, and what they share read once.

Cards begin alike: with the template that they are put in. Under causal attention nothing that
follows changes what a model makes of such an opening, so it is run once for all the cards behind
it, and their gradients are summed before they go back through it. A dropout mask is drawn once for
the opening, then, instead of once for each card; each activation is dropped as often as before.

transformers calls attention through a registry, so a model of any architecture that uses it runs on
packs without a change to its code. Each card is attended to by itself with the causal kernel,
which keeps no mask and no matrix of scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from app.errors import AppError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from app.cards.tokens import Example

PACKED_ATTENTION = "medfed_packed"

KeysAndValues = dict[nn.Module, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pack:
    """Several cards in one row of tokens, each without its opening.

    Attributes:
        input_ids: shape (1, tokens), int64; each card without its last token, which predicts
            nothing.
        position_ids: shape (1, tokens), int64; of each card, from the end of the opening on.
        lengths: tokens of each card in the pack.
        predictors: shape (labels,), int64: where in the pack a labelled token is predicted.
        labels: shape (labels,), int64: the tokens predicted there.
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]
    predictors: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Family:
    """Cards that begin alike.

    Attributes:
        opening: shape (1, tokens), int64: what they begin with, up to no token; it ends before
            the first labelled token of any of them is predicted.
        packs: the cards, without the opening.
    """

    opening: Tensor
    packs: tuple[Pack, ...]


def labelled_tokens(example: Example) -> int:
    """How many tokens of a card have a label: its answer, less a first token nothing precedes."""
    return max(0, len(example.input_ids) - max(1, example.prompt_length))


def pack(
    examples: Sequence[Example], max_tokens: int, pass_tokens: int, device: torch.device
) -> list[Family]:
    """Lay cards end to end in packs, those that begin alike behind one opening.

    Cards without any labelled token have no part in the loss and are left out.

    Args:
        examples: the cards, in any order.
        max_tokens: most tokens of a pack and its opening together; a card that is longer gets a
            pack to itself.
        pass_tokens: how many tokens it has to save to be worth a forward pass for an opening.
        device: where the tensors go.
    """
    labelled = sorted((card for card in examples if labelled_tokens(card)), key=_before_answer)
    if not labelled:
        return []
    _, families = _families(labelled, pass_tokens)
    shared = [family for family in families if family[0]]
    alone = [card for opening, cards in families if not opening for card in cards]
    return [
        Family(
            opening=torch.tensor([cards[0].input_ids[:opening]], dtype=torch.int64, device=device),
            packs=tuple(_packs(cards, opening, max_tokens, device)),
        )
        for opening, cards in [*shared, (0, alone)]
        if cards
    ]


def _before_answer(card: Example) -> tuple[int, ...]:
    """The tokens of a card that predict none with a label."""
    return card.input_ids[: max(1, card.prompt_length) - 1]


def _families(
    cards: list[Example], pass_tokens: int
) -> tuple[int, list[tuple[int, list[Example]]]]:
    """Tokens saved by sharing openings; their lengths, and the cards (sorted) that share each."""
    # Of sorted cards, what the first and the last have in common is common to all.
    pairs = zip(_before_answer(cards[0]), _before_answer(cards[-1]), strict=False)
    opening = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    saved, families = opening * (len(cards) - 1) - pass_tokens, [(opening, cards)]
    if saved <= 0:
        saved, families = 0, [(0, cards)]
    if opening == len(_before_answer(cards[-1])):
        return saved, families
    parts = [
        _families(list(part), pass_tokens)
        for _, part in groupby(cards, lambda card: _before_answer(card)[opening : opening + 1])
    ]
    apart = sum(part for part, _ in parts)
    if apart > saved:
        return apart, [family for _, part in parts for family in part]
    return saved, families


def _packs(
    cards: list[Example], opening: int, max_tokens: int, device: torch.device
) -> Iterator[Pack]:
    """As few packs as first-fit finds, longest first: the first one needs the most memory."""
    bins: list[list[Example]] = []
    rooms: list[int] = []
    for card in sorted(cards, key=lambda card: len(card.input_ids), reverse=True):
        tokens = len(card.input_ids) - 1 - opening
        fits = next((number for number, room in enumerate(rooms) if tokens <= room), len(bins))
        if fits == len(bins):
            bins.append([])
            rooms.append(max_tokens - opening)
        bins[fits].append(card)
        rooms[fits] -= tokens
    return (_lay_end_to_end(cards, opening, device) for cards in bins)


def _lay_end_to_end(cards: Sequence[Example], opening: int, device: torch.device) -> Pack:
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for card in cards:
        start, end = len(ids) - opening, len(card.input_ids) - 1
        first = max(1, card.prompt_length)
        ids += card.input_ids[opening:end]
        positions += range(opening, end)
        predictors += range(start + first - 1, start + end)
        labels += card.input_ids[first:]
        lengths.append(end - opening)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Pack(
        input_ids=tensor(ids).unsqueeze(0),
        position_ids=tensor(positions).unsqueeze(0),
        lengths=tuple(lengths),
        predictors=tensor(predictors),
        labels=tensor(labels),
    )


class Opening:
    """A family's opening as its cards attend to it: keys and values, run once for all of them.

    The cards' gradients gather at the keys and values; ``backward`` sends their sum on.
    """

    def __init__(self, network: PreTrainedModel, ids: Tensor) -> None:
        self._run: KeysAndValues = {}
        if ids.numel():
            network.get_decoder()(
                input_ids=ids,
                use_cache=False,
                packed_lengths=(ids.shape[1],),
                opening={},
                record=self._run,
            )
        # Gradients of many cards are summed here: in float32 where the model computes in less.
        self.keys_and_values: KeysAndValues = {
            module: (_leaf(keys), _leaf(values)) for module, (keys, values) in self._run.items()
        }

    def backward(self) -> None:
        """Add the gradient of the packs that were run behind the opening to the parameters."""
        ends = [
            (run, leaf.grad.to(run.dtype))
            for module, leaves in self.keys_and_values.items()
            for run, leaf in zip(self._run[module], leaves, strict=True)
            if leaf.grad is not None
        ]
        if ends:
            torch.autograd.backward([run for run, _ in ends], [gradient for _, gradient in ends])


def _leaf(run: Tensor) -> Tensor:
    leaf = run.detach().to(torch.promote_types(run.dtype, torch.float32))
    return leaf.requires_grad_(run.requires_grad)


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
    opening: KeysAndValues,
    record: KeysAndValues | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each card: (1, heads, tokens, dim) to (1, tokens, heads, dim)."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise AppError(
                f"expected plain softmax attention, found {name} in {type(module).__name__}",
                "train a model whose attention is the usual one (Llama, Mistral, Qwen2, ...)",
            )
    if record is not None:
        record[module] = key, value
    before = opening.get(module, (key[:, :, :0], value[:, :, :0]))
    shared = before[0].shape[2]
    window = options.get("sliding_window")
    if window is not None and shared + max(packed_lengths) > window:
        raise AppError(
            f"expected cards within the attention window of {window} tokens, "
            f"found one of {shared + max(packed_lengths)}",
            f"set train.seq-length to at most {window}",
        )
    # A key-value head becomes a batch of the query heads that share it, and is not copied.
    queries = query[0].unflatten(0, (key.shape[1], -1))
    cards = zip(
        queries.split(packed_lengths, dim=2),
        key[0].split(packed_lengths, dim=1),
        value[0].split(packed_lengths, dim=1),
        strict=True,
    )
    attended = []
    for q, *kv in cards:
        k, v = (
            torch.cat([first[0].to(own.dtype), own], dim=1)
            .unsqueeze(1)
            .expand(-1, q.shape[1], -1, -1)
            for first, own in zip(before, kv, strict=True)
        )
        # Queries of zeros stand for the opening's, so that the kernel's causal triangle fits.
        found = scaled_dot_product_attention(
            pad(q, (0, 0, shared, 0)), k, v, dropout_p=dropout, is_causal=True, scale=scaling
        )
        attended.append(found[:, :, shared:].permute(2, 0, 1, 3))
    return torch.cat(attended).flatten(1, 2).unsqueeze(0), None


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
