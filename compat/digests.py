"""Is what a hook stands on in Flower still as it was read?

A hook lists the functions of Flower's inside that it replaces or relies on, each with a digest of
its source. Another source is another meaning until somebody has read it. The version string decides
nothing: two versions with the same function are the same to a hook.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

# The versions that every digest was read in, oldest first; tests run on both ends.
SUPPORTED = ("1.41.0", "1.42.0")

# A digest that is the same in every supported version, or one for each version.
Digest = str | Mapping[str, str]
# By module, then by name in it: ``function``, ``Class`` or ``Class.method``.
Pins = Mapping[str, Mapping[str, Digest]]

# What stood at (module, name) before a hook of ours replaced it.
_originals: dict[tuple[str, str], Any] = {}


def differences(pins: Pins) -> list[str]:
    """Compare functions of the installed Flower with those that were read.

    A function that a hook has replaced in this process is compared as Flower has it.

    Returns:
        One line for each that is missing or changed.
    """
    found = []
    for module, names in pins.items():
        for name, known in names.items():
            function = original(module, name)
            if not callable(function):
                found.append(f"expected {module}.{name}, found none")
            elif _digest_or_none(function) not in _all(known):
                found.append(f"expected {module}.{name} as in {_versions()}, found it changed")
    return found


def digest(function: Callable[..., Any]) -> str:
    """The first 16 digits of the SHA-256 of a function's source, whatever is wrapped around it."""
    source = inspect.getsource(inspect.unwrap(function))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _digest_or_none(function: Callable[..., Any]) -> str | None:
    try:
        return digest(function)
    except (OSError, TypeError):  # it has no source: it is compiled, or no function at all
        return None


def replace(module: str, name: str, stand_in: object) -> Any:
    """Put ``stand_in`` in the place of a module's ``name``, or of a class's ``Class.name``.

    Returns:
        What was there before: Flower's own, or another hook's stand-in for it.
    """
    owner: Any = import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    before = getattr(owner, last)
    _originals.setdefault((module, name), before)
    setattr(owner, last, stand_in)
    return before


def original(module: str, name: str) -> Any:
    """A module's ``name`` as Flower has it, whatever a hook has put there; None: there is none."""
    if (module, name) in _originals:
        return _originals[module, name]
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _all(known: Digest) -> set[str]:
    return {known} if isinstance(known, str) else set(known.values())


def _versions() -> str:
    return f"flwr {' or '.join(SUPPORTED)}"
