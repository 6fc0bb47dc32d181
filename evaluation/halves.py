"""float32 products on a CPU's bfloat16 units: each number as the sum of two halves.

A CPU with AMX multiplies bfloat16 matrices several times as fast as float32 ones, but bfloat16
keeps 8 bits of a number. Two of them keep 16: ``x = high + low``. Of the four products of two such
sums, the largest is accumulated in float32, the next two are small enough for bfloat16, and the
last is below what two halves keep. What comes out is some 1e-5 of float32's own result away
(docs/evaluation.md), which is enough to choose a word by, save where two are nearly equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

# Below this many numbers a weight is multiplied as it is: a LoRA's matrices, for instance.
_LEAST_WEIGHT = 2**16


def available(model: Any) -> bool:
    """Whether this machine has such units and the model is computed in float32 on it."""
    return bool(
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and torch.cpu._is_amx_tile_supported()
    )


class HalvedProducts(TorchFunctionMode):
    """While entered, linear layers of ``model`` with frozen weights multiply by halves.

    Takes 4 bytes a weight on top of the model's own. The output layer is left alone: it has few
    rows to multiply, and its logits are compared.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        self._crossed = {
            module.weight: _crossed(module.weight)
            for module in model.modules()
            if isinstance(module, nn.Linear)
            and module is not head
            and module.weight.numel() >= _LEAST_WEIGHT
        }
        self._last: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Multiply by halves what is a known layer's product; leave the rest as it is."""
        if func is not linear or args[1] not in self._crossed:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        with _bfloat16_inside():
            product = linear(x, weight, *bias)
        return product.add_(linear(self._halves(x), self._crossed[weight]))

    def _halves(self, x: Tensor) -> Tensor:
        """(..., n) to (..., 2n): the high halves, then the low ones; layers often share an x."""
        if self._last is None or self._last[0] is not x:
            high = x.bfloat16()
            self._last = (x, torch.cat((high, (x - high).bfloat16()), dim=-1))
        return self._last[1]


def _crossed(weight: Tensor) -> Tensor:
    """(m, n) to (m, 2n): low halves for an x's high ones, and high halves for its low ones."""
    high = weight.bfloat16()
    return torch.cat(((weight - high).bfloat16(), high), dim=-1)


@contextmanager
def _bfloat16_inside() -> Iterator[None]:
    """Products of float32 matrices by their high halves, summed in float32."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
