"""The adapter as it travels: one flat array and the manifest that says what is in it.

The LoRA state of 30 layers with two projections each is 120 tensors. Sent one by one they are 120
objects, each with its own requests and its own row in the SuperLink's database at every hop; sent
flat they are one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import AppError

TENSOR_DIGITS = 8

FlatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Manifest:
    """The layout of a flat adapter: tensors in order of name, all float32, end to end.

    Attributes:
        shapes: name → shape, sorted by name.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Manifest:
        """Describe a state dict of arrays or tensors (anything with a ``shape``)."""
        return cls(tuple((name, tuple(state[name].shape)) for name in sorted(state)))

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes and dtype."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON; equal manifests give equal text."""
        tensors = [[name, list(shape)] for name, shape in self.shapes]
        return json.dumps({"dtype": "float32", "tensors": tensors}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse what `to_json` wrote.

        Raises:
            AppError: if the text is not a manifest.
        """
        try:
            raw = json.loads(text)
            if raw["dtype"] != "float32":
                raise ValueError(raw["dtype"])
            return cls(
                tuple((str(name), tuple(int(n) for n in shape)) for name, shape in raw["tensors"])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise AppError(
                "adapter manifest: expected JSON with dtype float32 and a list of tensors, "
                f"found {text[:60]!r}",
                "both ends must run the same version of the app",
            ) from error

    def check(self, other: Manifest) -> None:
        """Compare with the manifest of the other end.

        Raises:
            AppError: naming the first tensor that differs.
        """
        if self.shapes == other.shapes:
            return
        ours, theirs = dict(self.shapes), dict(other.shapes)
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise AppError(
                    f"adapter layout differs at {name}: expected {_shape(ours.get(name))}, "
                    f"found {_shape(theirs.get(name))}",
                    "model.name and model.lora.* must be the same at both ends",
                )


def pack(state: Mapping[str, npt.NDArray[np.float32]]) -> FlatArray:
    """Lay ``state`` (name → float32 array of any shape) end to end, in order of name."""
    if not state:
        return np.empty(0, dtype=np.float32)
    return np.concatenate([np.asarray(state[n], dtype=np.float32).ravel() for n in sorted(state)])


def unpack(flat: FlatArray, manifest: Manifest) -> dict[str, FlatArray]:
    """Cut a flat adapter of shape ``(manifest.size,)`` back into its tensors (views, no copies).

    Raises:
        AppError: if shape or dtype is not what the manifest says.
    """
    if flat.shape != (manifest.size,) or flat.dtype != np.float32:
        raise AppError(
            f"adapter: expected float32 of shape ({manifest.size},), "
            f"found {flat.dtype} of shape {flat.shape}",
            "model.name and model.lora.* must be the same at both ends",
        )
    state, start = {}, 0
    for name, shape in manifest.shapes:
        size = math.prod(shape)
        state[name] = flat[start : start + size].reshape(shape)
        start += size
    return state


def digest(flat: FlatArray) -> str:
    """SHA-256 of a flat adapter's bytes (little-endian float32)."""
    return hashlib.sha256(np.ascontiguousarray(flat, dtype="<f4").tobytes()).hexdigest()


def tensor_digests(flat: FlatArray, manifest: Manifest) -> str:
    """Eight hex digits of the SHA-256 of each tensor, in the manifest's order, run together.

    Two adapters that differ can be told apart by tensor without keeping either.
    """
    state = unpack(flat, manifest)
    return "".join(digest(state[name])[:TENSOR_DIGITS] for name, _ in manifest.shapes)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else str(shape)
