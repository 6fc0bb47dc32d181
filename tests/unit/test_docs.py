"""The documentation says what the code does."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
from flwr.common.config import flatten_dict
from typer.main import get_command

from app.config import RENAMED, RENAMED_UNTIL, RunConfig
from medfed.cli import app as cli

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def settings(cls=RunConfig):
    hints = get_type_hints(cls)
    for item in fields(cls):
        if item.metadata:
            yield item.metadata["key"], item.metadata["expected"]
        else:
            yield from settings(hints[item.name])


def verbs(command=None, path=()):
    command = command or get_command(cli)
    for name, sub in getattr(command, "commands", {}).items():
        if getattr(sub, "commands", None):
            yield from verbs(sub, (*path, name))
        else:
            yield " ".join((*path, name))


@pytest.mark.parametrize(("key", "expected"), list(settings()))
def test_every_setting_is_documented_with_default_and_range(key, expected):
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    default = flatten_dict(config)[key]
    shown = str(default).lower() if isinstance(default, bool) else str(default) or "nothing"
    assert f"| `{key}` | `{shown}` | {expected} |" in REFERENCE


@pytest.mark.parametrize(("old", "new"), list(RENAMED.items()))
def test_every_former_name_of_a_setting_is_documented_until_it_goes(old, new):
    assert f"| `{old}` | `{new}` |" in REFERENCE
    assert f"until version {RENAMED_UNTIL}" in REFERENCE


@pytest.mark.parametrize("verb", list(verbs()))
def test_every_verb_is_documented(verb):
    assert f"`medfed {verb}" in REFERENCE


def test_every_environment_variable_that_we_read_is_documented():
    found = set()
    for room in (
        "app",
        "common",
        "compat",
        "superlink",
        "supernode",
        "embedded",
        "medfed",
        "evaluation",
        "certs",
    ):
        for file in (ROOT / room).rglob("*.py"):
            found |= set(re.findall(r"\bMEDFED_[A-Z_]+\b", file.read_text()))
    missing = {name for name in found if f"`{name}`" not in REFERENCE}
    assert not missing


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"])
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_test_that_a_page_names_exists():
    """A name that ends in … is the beginning of one."""
    files = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py")]
    tests = {name for text in files for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
    named = {name for page in pages for name in re.findall(r"`(test_\w+…?)`", page.read_text())}
    assert named
    missing = {
        name
        for name in named
        if not (
            any(test.startswith(name[:-1]) for test in tests) if name[-1] == "…" else name in tests
        )
    }
    assert not missing
