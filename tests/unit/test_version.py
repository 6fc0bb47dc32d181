"""``medfed --version``."""

from __future__ import annotations

import platform
import subprocess
import sys
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


def test_it_needs_neither_flower_nor_torch():
    script = (
        "import sys; from medfed.cli import app\n"
        "try: app(['--version'])\n"
        "except SystemExit: print(sorted({'flwr', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
