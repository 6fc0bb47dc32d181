"""Many prompts in one forward pass: end to end, each attended to by itself after a shared prefix.

Left-padded batches pay for their padding and for a mask as large as the batch. Laid end to end,
prompts pay for themselves only: the linear layers see one long matrix without a gap in it, and
attention is computed prompt by prompt, over the keys and values of what all prompts begin with
(computed once) and its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PROMPT_ATTENTION = "medfed_prompts"


@dataclass(frozen=True)
class Prefix:
    """What all prompts begin with.

    Attributes:
        ids: its tokens; there may be none.
        states: for each layer (by index) its keys and values, (1, heads, len(ids), dim) each.
    """

    ids: tuple[int, ...]
    states: dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Layout:
    """What the attention of one forward pass has to know about it."""

    lengths: tuple[int, ...]
    prefix: dict[int, tuple[Tensor, Tensor]]
    masks: tuple[Tensor | None, ...]
    keep: dict[int, tuple[Tensor, Tensor]] | None = None


def why_not(model: Any) -> str | None:
    """Why prompts cannot be laid end to end for this model, or None if they can."""
    network = _network(model)
    if not getattr(network, "_supports_attention_backend", False):
        return f"{type(network).__name__} computes attention in a way of its own"
    config = network.config
    for name in ("sliding_window", "attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None) is not None:
            return f"its config sets {name} to {getattr(config, name)}"
    return None


def read_prefix(model: Any, ids: Sequence[int]) -> Prefix:
    """Compute the keys and values of what all prompts begin with, in ``prompt_attention``."""
    states: dict[int, tuple[Tensor, Tensor]] = {}
    if ids:
        layout = _Layout((len(ids),), {}, (None,), keep=states)
        _forward(model, [ids], 0, layout, torch.zeros(1, dtype=torch.int64))
    return Prefix(tuple(ids), states)


def next_token_logits(model: Any, prefix: Prefix, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the token after each prompt, shape (prompts, vocabulary), in ``prompt_attention``.

    Args:
        model: a causal language model (``why_not`` has nothing against it) in evaluation mode.
        prefix: what all prompts begin with.
        prompts: what follows in each: at least one token.
    """
    lengths = tuple(map(len, prompts))
    masks = _masks(model, lengths, len(prefix.ids))
    layout = _Layout(lengths, prefix.states, masks)
    ends = torch.tensor(lengths).cumsum(0) - 1
    return _forward(model, prompts, len(prefix.ids), layout, ends)


def _forward(
    model: Any, rows: Sequence[Sequence[int]], start: int, layout: _Layout, wanted: Tensor
) -> Tensor:
    def tensor(values: list[int]) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=model.device)

    logits: Tensor = model(
        input_ids=tensor([token for row in rows for token in row]),
        position_ids=tensor([start + i for row in rows for i in range(len(row))]),
        use_cache=False,
        logits_to_keep=wanted.to(model.device),
        prompt_layout=layout,
    ).logits
    return logits[0]


def _masks(model: Any, lengths: Sequence[int], shared: int) -> tuple[Tensor | None, ...]:
    """What each prompt's tokens may look at: all of the prefix, and no later token of its own."""
    if not shared:
        return (None,) * len(lengths)
    longest = max(lengths)
    lower = torch.ones(longest, shared + longest, dtype=torch.bool).tril(shared)
    mask = torch.zeros(lower.shape, dtype=model.dtype).masked_fill_(~lower, float("-inf"))
    mask = mask.to(model.device)
    return tuple(mask[:n, : shared + n] for n in lengths)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prompt_layout: _Layout,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each prompt: (1, heads, tokens, dim) to (1, tokens, heads, dim)."""
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if prompt_layout.keep is not None:
        prompt_layout.keep[layer] = (key, value)
    grouped = query.shape[1] != key.shape[1]
    prompts = zip(
        query.split(prompt_layout.lengths, dim=2),
        _after(prompt_layout, layer, 0, key),
        _after(prompt_layout, layer, 1, value),
        prompt_layout.masks,
        strict=True,
    )
    attended = [
        scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        ).transpose(1, 2)
        for q, k, v, mask in prompts
    ]
    return torch.cat(attended, dim=1), None


def _after(layout: _Layout, layer: int, which: int, states: Tensor) -> list[Tensor]:
    """Each prompt's keys (or values), after those of the prefix."""
    own = states.split(layout.lengths, dim=2)
    if not layout.prefix:
        return list(own)
    shared = layout.prefix[layer][which]
    return [torch.cat((shared, one), dim=2) for one in own]


AttentionInterface.register(PROMPT_ATTENTION, _attend)


def _network(model: Any) -> Any:
    """The network inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def prompt_attention(model: Any) -> Iterator[None]:
    """Let the model attend within prompts, and give it its own attention back afterwards."""
    network = _network(model)
    before = network.config._attn_implementation
    network.set_attn_implementation(PROMPT_ATTENTION)
    try:
        yield
    finally:
        network.set_attn_implementation(before)
