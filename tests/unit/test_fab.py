"""The FAB: what travels to a hospital is app/ and nothing else."""

from __future__ import annotations

import io
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fab():
    return zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT)))


def test_the_fab_holds_app_its_config_and_its_licence_only(fab):
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "app").rglob("*.py")}
    assert set(fab.namelist()) == expected | {"pyproject.toml", "LICENSE", ".info/CONTENT"}


def test_the_fab_asks_for_no_package_at_run_time(fab):
    """Flower would install them on the hospital's machine, from wherever it is told to."""
    assert tomllib.loads(fab.read("pyproject.toml").decode())["project"]["dependencies"] == []


def test_the_same_tree_gives_the_same_fab():
    assert build_fab_from_disk(ROOT) == build_fab_from_disk(ROOT)
