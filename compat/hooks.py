"""Which hooks into Flower's inside the installed Flower allows, and why not the others."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from .digests import SUPPORTED, Pins, differences

Side = Literal["superlink", "supernode"]


@dataclass(frozen=True)
class Hook:
    """One change to Flower.

    Args:
        name: the module in this room.
        gives: what it changes, in a few words.
        without: what a federation is like without it.
        pins: the functions that it replaces or relies on, by digest.
        requires: other hooks that it cannot do without.
        check: further differences, of what has no source to take a digest of.
    """

    name: str
    gives: str
    without: str
    pins: Pins
    requires: tuple[str, ...] = ()
    check: Callable[[], list[str]] = list

    def differences(self) -> list[str]:
        """What in the installed Flower is not as this hook knows it, a line for each."""
        found = differences(self.pins)
        try:
            return [*found, *self.check()]
        except ImportError as error:
            return [*found, _cannot_be_imported(error)]


@dataclass(frozen=True)
class State:
    """Whether the installed Flower allows a hook.

    Attributes:
        name: the hook's.
        side: whose process it changes.
        active: whether it is used.
        gives: what it changes.
        without: what a federation is like without it.
        reasons: why it is not used; empty if it is.
    """

    name: str
    side: Side
    active: bool
    gives: str
    without: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What the installed Flower allows.

    Attributes:
        flower: its version.
        supported: the versions that every hook was read in.
        hooks: each hook, the SuperLink's first.
    """

    flower: str
    supported: tuple[str, ...]
    hooks: tuple[State, ...]

    @property
    def off(self) -> tuple[State, ...]:
        """Hooks that are not used."""
        return tuple(hook for hook in self.hooks if not hook.active)

    def active(self, name: str) -> bool:
        """Whether a hook is used."""
        return any(hook.active for hook in self.hooks if hook.name == name)

    def summary(self) -> str:
        """One line, as a process prints it when it starts."""
        on = len(self.hooks) - len(self.off)
        return f"Flower {self.flower}: {on} of {len(self.hooks)} hooks active"

    def warnings(self) -> list[str]:
        """A line for each hook that is not used: what that costs, and why."""
        return [f"{hook.name} is off ({'; '.join(hook.reasons)}): {hook.without}"
                for hook in self.off]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """The same for a script."""
        return asdict(self)


# In the order in which they are put in place.
_MODULES: Mapping[Side, tuple[str, ...]] = {
    "superlink": ("long_polling", "serverapp_watchdog", "certificate_renewal", "replay_guard"),
    "supernode": ("site_gate", "retry", "supernode_polling", "heartbeats", "clientapp_watchdog"),
}


def report(*sides: Side) -> Report:
    """Which hooks the installed Flower allows; by default those of both sides.

    It reads source and changes nothing.
    """
    found = [
        state for side in sides or _MODULES for state in _states(side, map(_load, _MODULES[side]))
    ]
    return Report(metadata.version("flwr"), SUPPORTED, tuple(found))


def _load(module: str) -> Hook:
    try:
        hook: Hook = import_module(f".{module}", __package__).HOOK
    except ImportError as error:
        return _unusable(module, error)
    return hook


def _unusable(module: str, error: ImportError) -> Hook:
    """A hook whose file imports a name that the installed Flower does not have."""
    source = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    title = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    reason = _cannot_be_imported(error)
    return Hook(
        name=module,
        gives=title.removeprefix("Hook: ").rstrip("."),
        without="this part is as in Flower",
        pins={},
        check=lambda: [reason],
    )


def _cannot_be_imported(error: ImportError) -> str:
    if (error.name or "").partition(".")[0] != "flwr":
        raise error  # not Flower has changed: this installation is not whole
    return f"expected every name that it imports, found: {error}"


def _states(side: Side, hooks: Iterable[Hook]) -> list[State]:
    found: dict[str, State] = {}
    for hook in hooks:
        missing = [f"it needs {name}, which is off" for name in hook.requires
                   if not found[name].active]  # fmt: skip
        reasons = (*hook.differences(), *missing)
        found[hook.name] = State(hook.name, side, not reasons, hook.gives, hook.without, reasons)
    return list(found.values())
