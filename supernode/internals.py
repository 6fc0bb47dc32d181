"""Is what this room stands on in Flower still as it was read?

Whoever replaces or calls something of Flower's that is no public interface lists it with a digest
of its source. Another source is another meaning until somebody has read it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any

FLOWER = "1.41.0"


def findings(expected: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Compare the installed Flower with the one that a file was written for.

    Args:
        expected: by module, then by name in it (``function`` or ``Class.method``): the
            :func:`digest` of its source.

    Returns:
        One line per difference.
    """
    installed = metadata.version("flwr")
    if installed != FLOWER:
        return [f"expected flwr {FLOWER}, found {installed}"]
    return [
        difference
        for module, names in expected.items()
        for difference in differences(vars(import_module(module)), names, module)
    ]


def differences(module: Mapping[str, Any], expected: Mapping[str, str], where: str) -> list[str]:
    """Compare the source of functions of one module with what is expected of it."""
    found = []
    for name, known in expected.items():
        first, *others = name.split(".")
        function = module.get(first)
        for other in others:
            function = getattr(function, other, None)
        if not callable(function):
            found.append(f"expected a function {where}.{name}")
        elif digest(function) != known:
            found.append(f"expected {where}.{name} as in flwr {FLOWER}, found it changed")
    return found


def digest(function: Callable[..., Any]) -> str:
    """The first 16 digits of the SHA-256 of a function's source, whatever is wrapped around it."""
    source = inspect.getsource(inspect.unwrap(function))
    return hashlib.sha256(source.encode()).hexdigest()[:16]
