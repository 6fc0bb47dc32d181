"""``medfed --version``."""

from __future__ import annotations

import platform
from importlib import metadata

from typer.testing import CliRunner

from medfed.cli import app


def test_it_names_medfed_flower_and_python():
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.stdout.strip() == (
        f"medfed {metadata.version('medfed')}, flwr {metadata.version('flwr')}, "
        f"Python {platform.python_version()}"
    )
