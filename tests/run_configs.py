"""The run config of pyproject.toml, parsed."""

from __future__ import annotations

import tomllib
from pathlib import Path

from flwr.common.config import flatten_dict

from app.config import RunConfig

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def default_values():
    """Flat, as Flower hands it to the app."""
    return flatten_dict(tomllib.loads(PYPROJECT.read_text())["tool"]["flwr"]["app"]["config"])


def default_config(**overrides):
    """Typed."""
    return RunConfig.parse({**default_values(), **overrides})
