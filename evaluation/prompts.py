"""Many prompts in one forward pass: end to end, each attended to by itself after a shared prefix.

Left-padded batches pay for their padding and for a mask as large as the batch. Laid end to end,
prompts pay for themselves only: the linear layers see one long matrix without a gap in it, and
attention is computed prompt by prompt, over the keys and values of what all prompts begin with
(computed once) and its own. Of the last layer only each prompt's last row is read, so only there do
its attention and its MLP compute anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PROMPT_ATTENTION = "medfed_prompts"

# Queries that attend together. The kernel computes all scores of a call and then drops those of
# later tokens: blocks of a long prompt spare most of these.
_QUERY_ROWS = 64


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
    ends: Tensor
    last_layer: int
    prefix: dict[int, tuple[Tensor, Tensor]]
    mask: Tensor
    keep: dict[int, tuple[Tensor, Tensor]] | None


# The layout of the pass that this thread is at: each core has a batch of its own.
_LAYOUT: ContextVar[_Layout] = ContextVar("layout")


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
        _forward(model, [ids], Prefix((), {}), keep=states)
    return Prefix(tuple(ids), states)


def next_token_logits(model: Any, prefix: Prefix, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the token after each prompt, shape (prompts, vocabulary), in ``prompt_attention``.

    Args:
        model: a causal language model (``why_not`` has nothing against it) in evaluation mode.
        prefix: what all prompts begin with.
        prompts: what follows in each: at least one token.
    """
    return _forward(model, prompts, prefix)


def _forward(
    model: Any,
    rows: Sequence[Sequence[int]],
    prefix: Prefix,
    keep: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    def tensor(values: list[int]) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=model.device)

    lengths = tuple(map(len, rows))
    shared = len(prefix.ids)
    ends = (torch.tensor(lengths).cumsum(0) - 1).to(model.device)
    last_layer = _network(model).config.num_hidden_layers - 1
    mask = _mask(model, max(lengths), shared)
    layout = _Layout(lengths, ends, last_layer, prefix.states, mask, keep)
    outer = _LAYOUT.set(layout)
    try:
        logits: Tensor = model(
            input_ids=tensor([token for row in rows for token in row]),
            position_ids=tensor([shared + i for row in rows for i in range(len(row))]),
            use_cache=False,
            logits_to_keep=ends,
        ).logits
    finally:
        _LAYOUT.reset(outer)
    return logits[0]


def _mask(model: Any, longest: int, shared: int) -> Tensor:
    """What a prompt's tokens may look at: all of the prefix, and no later token of its own."""
    allowed = torch.ones(longest, shared + longest, dtype=torch.bool).tril(shared)
    mask = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill_(~allowed, float("-inf"))
    return mask.to(model.device)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each prompt: (1, heads, tokens, dim) to (1, tokens, heads, dim)."""
    layout = _LAYOUT.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if layout.keep is not None:
        layout.keep[layer] = (key, value)
    block = _QUERY_ROWS if query.device.type == "cpu" else query.shape[2]
    prompts = zip(
        query.split(layout.lengths, dim=2),
        _after(layout, layer, 0, key),
        _after(layout, layer, 1, value),
        strict=True,
    )
    attended = []
    for q, k, v in prompts:
        tokens = q.shape[2]
        first = tokens - 1 if layer == layout.last_layer else 0
        attended.append(q.new_zeros(q[:, :, :first].shape))
        for start in range(first, tokens, block):
            end = min(start + block, tokens)
            seen = k.shape[2] - tokens + end
            attended.append(
                scaled_dot_product_attention(
                    q[:, :, start:end],
                    k[:, :, :seen],
                    v[:, :, :seen],
                    attn_mask=layout.mask[start:end, :seen],
                    scale=scaling,
                    enable_gqa=query.shape[1] != key.shape[1],
                )
            )
    return torch.cat(attended, dim=2).transpose(1, 2), None


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
        with _last_rows_only(network):
            yield
    finally:
        network.set_attn_implementation(before)


@contextmanager
def _last_rows_only(network: Any) -> Iterator[None]:
    """Let the last layer's MLP see only the rows whose logits are wanted, and fill in zeros."""
    layers = getattr(network.get_decoder(), "layers", [None])
    mlp: Any = getattr(layers[-1], "mlp", None)
    if not type(mlp).__name__.endswith("MLP"):  # a mixture of experts returns more than rows
        yield
        return

    def narrow(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0][:, _LAYOUT.get().ends],)

    def widen(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        layout = _LAYOUT.get()
        full = output.new_zeros(1, sum(layout.lengths), output.shape[-1])
        full[:, layout.ends] = output
        return full

    hooks = (mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
