"""Attention over packed sequences: one implementation for training and evaluation.

Sample packing puts several sequences into one row of tokens, without padding. Each sequence attends
to its own tokens and to the keys and values of a prefix that all sequences of the row share;
under causal attention nothing that follows the prefix changes them, so they are computed once.

transformers calls attention through a registry. Any architecture that uses the registry therefore
runs on packed sequences without a change to its code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from app.errors import AppError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED_ATTENTION = "medfed_packed"

# Query rows per call of the masked kernel on a CPU. The kernel computes every score of a call and
# then drops those of later tokens: in blocks, a long sequence computes few that it drops.
_BLOCK_ROWS = 64

# Keys and values by attention module, each (1, key-value heads, tokens, dim).
KeysAndValues = dict[nn.Module, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PackedSequences:
    """What attention has to know about the row of tokens of one forward pass.

    Passed to the model as the keyword ``sequences``; transformers hands it on to every layer.

    Attributes:
        lengths: tokens of each sequence, the shared prefix not counted.
        prefix: keys and values of the shared prefix; empty: there is none.
        mask: ``causal_mask`` of the longest sequence, for a pass without gradients: attention runs
            in blocks, which is faster. None: the causal kernel, which keeps no scores for the
            backward pass.
        last_rows_layer: index of the layer in which only the last row of each sequence is computed
            and the others are zero (needs ``mask``); None: every row of every layer.
        record: filled with the keys and values of every layer.
    """

    lengths: tuple[int, ...]
    prefix: KeysAndValues
    mask: Tensor | None = None
    last_rows_layer: int | None = None
    record: KeysAndValues | None = None


def causal_mask(longest: int, prefix: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask, shape (longest, prefix + longest): 0 where a row may attend, else -inf.

    Row ``i`` attends to the whole prefix and to the first ``i + 1`` tokens of its sequence.
    """
    allowed = torch.ones(longest, prefix + longest, dtype=torch.bool).tril(prefix)
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))
    return mask.to(device)


class SharedPrefix:
    """Keys and values of a prefix that packed sequences share, computed in one forward pass.

    The gradients of all sequences add up at the keys and values; ``backward`` sends their sum
    through the prefix once.

    Args:
        network: a causal language model inside ``packed_attention``.
        ids: shape (1, tokens), int64; of no tokens: there is no prefix and no pass.
        mask: as in ``PackedSequences``, of the prefix itself.
    """

    def __init__(self, network: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> None:
        self.length = ids.shape[1]
        self._computed: KeysAndValues = {}
        if self.length:
            network.get_decoder()(
                input_ids=ids,
                use_cache=False,
                sequences=PackedSequences((self.length,), {}, mask, record=self._computed),
            )
        # Many sequences add their gradients here: in float32 where the model computes in less.
        self.keys_and_values: KeysAndValues = {
            module: (_leaf(keys), _leaf(values))
            for module, (keys, values) in self._computed.items()
        }

    def backward(self) -> None:
        """Add the gradient of the sequences behind the prefix to the parameters."""
        ends = [
            (computed, leaf.grad.to(computed.dtype))
            for module, leaves in self.keys_and_values.items()
            for computed, leaf in zip(self._computed[module], leaves, strict=True)
            if leaf.grad is not None
        ]
        if ends:
            torch.autograd.backward(
                [computed for computed, _ in ends], [gradient for _, gradient in ends]
            )


def _leaf(computed: Tensor) -> Tensor:
    leaf = computed.detach().to(torch.promote_types(computed.dtype, torch.float32))
    return leaf.requires_grad_(computed.requires_grad)


@contextmanager
def packed_attention(network: PreTrainedModel) -> Iterator[None]:
    """Let ``network`` attend within packed sequences; restore its own attention afterwards.

    Raises:
        AppError: the architecture does not call attention through the registry.
    """
    before = network.config._attn_implementation
    network.set_attn_implementation(PACKED_ATTENTION)
    if network.config._attn_implementation != PACKED_ATTENTION:
        raise AppError(
            f"expected a model whose attention can be chosen, found {type(network).__name__}",
            "use an architecture with transformers' attention interface (Llama, Mistral, ...)",
        )
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequences: PackedSequences,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence: (1, heads, tokens, dim) to (1, tokens, heads, dim)."""
    if sequences.record is not None:
        sequences.record[module] = key, value
    prefix = sequences.prefix.get(module, (key[:, :, :0], value[:, :, :0]))
    _check(module, options, prefix[0].shape[2] + max(sequences.lengths))
    last_rows_only = (
        sequences.last_rows_layer is not None
        and getattr(module, "layer_idx", None) == sequences.last_rows_layer
    )
    # A key-value head becomes a batch of the query heads that share it, and is not copied.
    queries = query[0].unflatten(0, (key.shape[1], -1))
    parts = zip(
        queries.split(sequences.lengths, dim=2),
        key[0].split(sequences.lengths, dim=1),
        value[0].split(sequences.lengths, dim=1),
        strict=True,
    )
    attended: list[Tensor] = []
    for rows, *own in parts:
        keys, values = (
            torch.cat([first[0].to(rest.dtype), rest], dim=1)
            .unsqueeze(1)
            .expand(-1, rows.shape[1], -1, -1)
            for first, rest in zip(prefix, own, strict=True)
        )
        if sequences.mask is None:
            found = [_causal(rows, keys, values, dropout, scaling)]
        else:
            first = rows.shape[2] - 1 if last_rows_only else 0
            found = _in_blocks(rows, keys, values, sequences.mask, first, dropout, scaling)
        attended += [block.permute(2, 0, 1, 3) for block in found]
    return torch.cat(attended).flatten(1, 2).unsqueeze(0), None


def _check(module: nn.Module, options: dict[str, Any], longest: int) -> None:
    """Refuse attention that is more than a causal softmax over all ``longest`` tokens."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise AppError(
                f"expected plain softmax attention, found {name} in {type(module).__name__}",
                "train a model whose attention is the usual one (Llama, Mistral, Qwen2, ...)",
            )
    window = options.get("sliding_window")
    if window is not None and longest > window:
        raise AppError(
            f"expected cards within the attention window of {window} tokens, "
            f"found one of {longest}",
            f"set train.seq-length to at most {window}",
        )


def _causal(
    queries: Tensor, keys: Tensor, values: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """Every row of one sequence, by the kernel that keeps no mask and no scores."""
    prefix = keys.shape[2] - queries.shape[2]
    # Zeros stand for the prefix's own queries, so that the kernel's causal triangle fits.
    found = scaled_dot_product_attention(
        pad(queries, (0, 0, prefix, 0)),
        keys,
        values,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
    )
    return found[:, :, prefix:]


def _in_blocks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    first: int,
    dropout: float,
    scaling: float | None,
) -> list[Tensor]:
    """The rows of one sequence, zeros before row ``first``, as blocks in their order."""
    tokens = queries.shape[2]
    block = _BLOCK_ROWS if queries.device.type == "cpu" else tokens
    found = [queries.new_zeros(queries[:, :, :first].shape)] if first else []
    for start in range(first, tokens, block):
        end = min(start + block, tokens)
        seen = keys.shape[2] - tokens + end
        found.append(
            scaled_dot_product_attention(
                queries[:, :, start:end],
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=mask[start:end, :seen],
                dropout_p=dropout,
                scale=scaling,
            )
        )
    return found


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
