"""Imports point one way (docs/architecture.md)."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = {"app", "certs", "embedded", "evaluation", "superlink", "supernode", "medfed", "benchmarks"}
MAY_IMPORT = {
    "app": set(),
    "certs": set(),
    "superlink": set(),
    "supernode": set(),
    "embedded": {"app"},
    "evaluation": {"app"},
    "benchmarks": ROOMS - {"benchmarks"},
    "medfed": ROOMS - {"medfed", "benchmarks"},
}


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_what_it_may(room):
    for file in (ROOT / room).rglob("*.py"):
        strangers = (imports_of(file) & ROOMS) - {room} - MAY_IMPORT[room]
        assert not strangers, f"{file.relative_to(ROOT)} imports {strangers}"


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
