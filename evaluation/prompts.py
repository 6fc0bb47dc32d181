"""Sample packing for prompts: many in one forward pass, without padding.

The linear layers see one long matrix without a gap. Attention (``app.training.attention``) runs
prompt by prompt, over the keys and values of the shared prefix, which are computed once, and over
the prompt's own. Only the last row of each prompt is read, so the last layer computes its attention
and its MLP only there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from app.training.attention import PackedSequences, SharedPrefix, causal_mask, packed_attention


class _LastRows(NamedTuple):
    """Where the last row of each prompt is: ``positions``, shape (prompts,), among ``tokens``."""

    positions: Tensor
    tokens: int


# Of this thread's forward pass: each core runs batches of its own. None: every row is needed.
_LAST_ROWS: ContextVar[_LastRows | None] = ContextVar("last_rows", default=None)


def why_not_packed(model: Any) -> str | None:
    """Why this model cannot run on packed prompts, or None if it can."""
    network = _network(model)
    if not getattr(network, "_supports_attention_backend", False):
        return f"{type(network).__name__} computes attention in a way of its own"
    config = network.config
    for name in ("sliding_window", "attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None) is not None:
            return f"its config sets {name} to {getattr(config, name)}"
    return None


def read_prefix(model: Any, ids: Sequence[int]) -> SharedPrefix:
    """Compute the keys and values of the shared prefix, in ``prompt_attention``."""
    mask = causal_mask(len(ids), 0, model.dtype, model.device)
    return SharedPrefix(_network(model), _row(ids, model.device), mask)


def next_token_logits(model: Any, prefix: SharedPrefix, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the token after each prompt, shape (prompts, vocabulary), in ``prompt_attention``.

    Args:
        model: a causal language model (``why_not_packed`` says None) in evaluation mode.
        prefix: what all prompts begin with.
        prompts: token ids that follow the prefix, at least one for each prompt.
    """
    lengths = tuple(map(len, prompts))
    ends = (torch.tensor(lengths).cumsum(0) - 1).to(model.device)
    sequences = PackedSequences(
        lengths,
        prefix.keys_and_values,
        mask=causal_mask(max(lengths), prefix.length, model.dtype, model.device),
        last_rows_layer=_network(model).config.num_hidden_layers - 1,
    )
    positions = [prefix.length + i for prompt in prompts for i in range(len(prompt))]
    outer = _LAST_ROWS.set(_LastRows(ends, sum(lengths)))
    try:
        logits: Tensor = model(
            input_ids=_row([token for prompt in prompts for token in prompt], model.device),
            position_ids=_row(positions, model.device),
            use_cache=False,
            logits_to_keep=ends,
            sequences=sequences,
        ).logits
    finally:
        _LAST_ROWS.reset(outer)
    return logits[0]


def _row(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([list(values)], dtype=torch.int64, device=device)


def _network(model: Any) -> Any:
    """The network inside an adapter's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def prompt_attention(model: Any) -> Iterator[None]:
    """Let the model attend within packed prompts; restore its own attention afterwards."""
    network = _network(model)
    with packed_attention(network), _last_rows_only(network):
        yield


@contextmanager
def _last_rows_only(network: Any) -> Iterator[None]:
    """Let the last layer's MLP compute only the rows that are read; the others become zero."""
    layers = getattr(network.get_decoder(), "layers", [None])
    mlp: Any = getattr(layers[-1], "mlp", None)
    if not type(mlp).__name__.endswith("MLP"):  # a mixture of experts returns more than rows
        yield
        return

    def narrow(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        rows = _LAST_ROWS.get()
        return None if rows is None else (inputs[0][:, rows.positions],)

    def widen(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        rows = _LAST_ROWS.get()
        if rows is None:
            return None
        full = output.new_zeros(1, rows.tokens, output.shape[-1])
        full[:, rows.positions] = output
        return full

    hooks = (mlp.register_forward_pre_hook(narrow), mlp.register_forward_hook(widen))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
