"""Imports point one way (docs/architecture.md)."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {
    "app", "benchmarks", "certs", "common", "compat", "embedded", "evaluation", "medfed",
    "superlink", "supernode",
}  # fmt: skip
MAY_IMPORT = {
    "app": set(),
    "certs": {"common"},
    "superlink": {"common", "compat"},
    "supernode": {"common", "compat"},
    "common": set(),
    "compat": {"common"},
    "embedded": {"app", "common"},
    "evaluation": {"app", "common"},
    "benchmarks": ROOMS - {"benchmarks"},
    "medfed": ROOMS - {"medfed", "benchmarks"},
}
# The floors of app/, from the top: a file may import its own floor and those below.
FLOORS = (
    ("app.server_app", "app.client_app"),
    ("app.server",),
    ("app.training",),
    ("app.adapter",),
    ("app.cards",),
    ("app",),
)


def modules(room: str) -> dict[str, Path]:
    """Every module of a room by its dotted name."""
    found = {}
    for file in sorted((ROOT / room).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(source: str, package: str, known: Iterable[str]) -> set[str]:
    """What a module imports, wherever in it: a known module's name in full, else the first part.

    Args:
        source: its text.
        package: the package that it is in, for relative imports.
        known: modules whose names are told in full.
    """
    known = set(known)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            # `from package import module` is an import of that module, not of the package.
            names = [
                inner if (inner := f"{base}.{alias.name}") in known else base
                for alias in node.names
            ]
        else:
            continue
        found |= {name if name in known else name.split(".")[0] for name in names}
    return found


def package_of(name: str, file: Path) -> str:
    return name if file.name == "__init__.py" else name.rpartition(".")[0]


def imports_in(room: str) -> dict[str, set[str]]:
    known = {name: file for each in ROOMS for name, file in modules(each).items()}
    return {
        name: imports_of(file.read_text(), package_of(name, file), known)
        for name, file in modules(room).items()
    }


def circle(imports: Mapping[str, set[str]]) -> list[str]:
    """A circle of modules that import one another; empty if there is none."""
    graph = {name: {other for other in found if other in imports} - {name}
             for name, found in imports.items()}  # fmt: skip
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def floor(name: str) -> int:
    """0 is the ground: the longest prefix among ``FLOORS`` says where a module is."""
    names = ((len(prefix), len(FLOORS) - n - 1) for n, floor in enumerate(FLOORS)
             for prefix in floor if name == prefix or name.startswith(f"{prefix}."))  # fmt: skip
    return max(names)[1]


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_it_may(room):
    for name, found in imports_in(room).items():
        strangers = ({other.split(".")[0] for other in found} & ROOMS) - {room} - MAY_IMPORT[room]
        assert not strangers, f"{name} imports {strangers}"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_no_files_of_a_room_import_one_another_in_a_circle(room):
    assert circle(imports_in(room)) == []


def test_a_file_of_the_app_imports_no_floor_above_its_own():
    for name, found in imports_in("app").items():
        above = {
            other
            for other in found
            if other.split(".")[0] == "app" and other != "app" and floor(other) > floor(name)
        }
        assert not above, f"{name} imports {above}"


def test_every_floor_of_the_app_is_in_use():
    on = {floor(name) for name in modules("app")}
    assert on == set(range(len(FLOORS)))
    assert floor("app.cards.files") == 1
    assert floor("app.config") == 0
    assert floor("app.server_app") == len(FLOORS) - 1


def test_two_files_that_import_each_other_are_found():
    files = {
        "room.a": "from room.b import one",
        "room.b": "def late():\n    from . import c",
        "room.c": "import room.a",
        "room.d": "from room import a",
    }
    imports = {name: imports_of(text, "room", files) for name, text in files.items()}
    assert imports["room.b"] == {"room.c"}
    assert sorted(set(circle(imports))) == ["room.a", "room.b", "room.c"]
    assert circle({**imports, "room.c": set()}) == []


def test_relative_imports_are_told_in_full():
    known = {"room.inner.a", "room.b"}
    assert imports_of("from ..b import x", "room.inner", known) == {"room.b"}
    assert imports_of("from .. import b", "room.inner", known) == {"room.b"}
    assert imports_of("from .a import x\nimport os.path", "room.inner", known) == {
        "room.inner.a",
        "os",
    }


@pytest.mark.parametrize("module", ["medfed.cli", "superlink.health", "supernode.health"])
def test_the_command_line_starts_without_torch(module):
    heavy = ("torch", "transformers", "ray")
    code = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
        check=True,
    )
    assert done.stdout.strip() == "[]"
