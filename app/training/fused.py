"""Fused operations of a Llama layer for a CPU: the same mathematics, fewer passes over memory.

Between its matrix products a training step normalises, rotates and gates. Written operation by
operation, each of these reads and writes its activations many times; where a tensor is cut in two,
its backward pass fills whole tensors with zeros. Here each is one function with its own derivative
(RMSNorm 1910.07467, rotary embedding 2104.09864, SwiGLU 2002.05202) that works in place. LoRA's
product (2106.09685) is scaled and added as it is computed.

They replace the classes of transformers' Llama family, on a CPU, in a precision that needs no
casts. Everything else runs as transformers wrote it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn.functional import silu

_ROTARY = "apply_rotary_pos_emb"
_ROTARY_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]


@contextmanager
def fused(network: nn.Module) -> Iterator[None]:
    """Let ``network`` run on the fused operations below, where they fit; undo it afterwards."""
    with ExitStack() as stack:
        if next(network.parameters()).device.type == "cpu":
            for module in network.modules():
                if forward := _forward(module):
                    stack.enter_context(mock.patch.object(module, "forward", forward))
            for python_module in _rotary_modules(network):
                stack.enter_context(mock.patch.object(python_module, _ROTARY, rotate))
        yield


def _forward(module: Any) -> Callable[[Tensor], Tensor] | None:
    if type(module) is Linear:
        return _lora_forward(module)
    name = type(module).__name__
    if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        weight, epsilon, usual = module.weight, module.variance_epsilon, module.forward
        if not weight.requires_grad:
            # In any other precision transformers casts to float32 and back.
            return lambda hidden: (
                normalise(hidden, weight, epsilon)
                if hidden.dtype == torch.float32
                else usual(hidden)
            )
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if name.endswith("MLP") and all(hasattr(module, part) for part in parts):
        if "silu" not in type(module.act_fn).__name__.lower():
            return None
        return lambda hidden: module.down_proj(
            gate(module.gate_proj(hidden), module.up_proj(hidden))
        )
    return None


def _lora_forward(module: Linear) -> Callable[[Tensor], Tensor] | None:
    """``base(x) + scaling * B(A(dropout(x)))``: the sum, the product and its scale in one pass."""
    if module.merged or module.disable_adapters or len(module.active_adapters) != 1:
        return None
    [name] = module.active_adapters
    base, narrow, wide = module.base_layer, module.lora_A[name], module.lora_B[name]
    if name in module.lora_variant or wide.bias is not None:
        return None
    dropout, scaling, usual = module.lora_dropout[name], module.scaling[name], module.forward

    def forward(hidden: Tensor) -> Tensor:
        if hidden.dtype != wide.weight.dtype:
            return usual(hidden)
        low_rank = narrow(dropout(hidden)).flatten(0, -2)
        total = torch.addmm(base(hidden).flatten(0, -2), low_rank, wide.weight.t(), alpha=scaling)
        return total.unflatten(0, hidden.shape[:-1])

    return forward


def _rotary_modules(network: nn.Module) -> set[Any]:
    """The Python modules of transformers whose attention rotates queries and keys as Llama does."""
    python_modules = {sys.modules[type(module).__module__] for module in network.modules()}
    return {
        one
        for one in python_modules
        if hasattr(one, _ROTARY)
        and list(inspect.signature(getattr(one, _ROTARY)).parameters) == _ROTARY_PARAMETERS
    }


def normalise(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm with a frozen weight: ``(..., width)`` to the same."""
    normalised: Tensor = _Normalise.apply(hidden, weight, epsilon)  # type: ignore[no-untyped-call]
    return normalised


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = (norm * norm / hidden.shape[-1] + epsilon).rsqrt()
        ctx.save_for_backward(hidden, weight, scale)
        normalised: Tensor = (hidden * scale).mul_(weight)
        return normalised

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        hidden, weight, scale = ctx.saved_tensors
        gradient = outer[0] * weight
        along = torch.linalg.vecdot(gradient, hidden).unsqueeze(-1)
        along *= scale**3 / hidden.shape[-1]
        return gradient.mul_(scale).addcmul_(hidden, along, value=-1), None, None


def gate(gates: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product ``silu(gates) * up``, both of one shape."""
    product: Tensor = _Gate.apply(gates, up)  # type: ignore[no-untyped-call]
    return product


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gates, up)
        return silu(gates).mul_(up)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor]:
        gates, up = ctx.saved_tensors
        towards_gates: Tensor = torch.ops.aten.silu_backward(outer[0] * up, gates)
        return towards_gates, silu(gates).mul_(outer[0])


def rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys ``(batch, heads, tokens, dim)`` as transformers' Llama does.

    Args:
        q: queries.
        k: keys; they may have fewer heads.
        cos: ``(batch, tokens, dim)``, the second half of ``dim`` repeating the first.
        sin: likewise.
        unsqueeze_dim: where the heads are.
    """
    half = cos.shape[-1] // 2
    cosine, sine = (table[..., :half].unsqueeze(unsqueeze_dim) for table in (cos, sin))
    rotated: Callable[..., Tensor] = _Rotate.apply
    return rotated(q, cosine, sine), rotated(k, cosine, sine)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(heads, cosine, sine)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(outer[0], cosine, -sine), None, None


def _rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    out = torch.empty_like(heads)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cosine, out=left).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=right).addcmul_(first, sine)
    return out
