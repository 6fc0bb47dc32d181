"""Every package is pinned to one version, and to the files that may be installed for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "requirements"
NAMES = ("runtime", "torch-cpu", "cuda", "dev", "flower-1.41")
PIN = re.compile(
    r"^([a-z0-9-]+)(?:\[[a-z,]+\])?==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
    re.MULTILINE,
)


def pins(name: str) -> dict[str, tuple[str, str]]:
    """What a file pins: name → version and hashes."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    return {package: (version, hashes) for package, version, hashes in PIN.findall(text)}


@pytest.mark.parametrize("name", NAMES)
def test_every_line_is_a_version_with_hashes(name):
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert pins(name)
    assert PIN.sub("", text).count("\n") == 1, (
        "more than the first line, which says where it is from"
    )


@pytest.mark.parametrize("name", ["runtime", "dev", "flower-1.41"])
def test_what_is_asked_for_is_pinned(name):
    asked = re.findall(r"^([a-z][a-z0-9-]*)", (FOLDER / f"{name}.in").read_text(), re.MULTILINE)
    assert asked
    assert set(asked) <= set(pins(name)) | set(pins("runtime"))


def test_torch_may_be_the_cpu_build_too():
    """pip takes only what both files allow."""
    (version, hashes), (cpu_version, cpu_hashes) = (
        pins("runtime")["torch"],
        pins("torch-cpu")["torch"],
    )
    assert cpu_version == f"{version}+cpu"
    assert set(re.findall("[0-9a-f]{64}", cpu_hashes)) < set(re.findall("[0-9a-f]{64}", hashes))


def test_the_oldest_flower_only_changes_what_is_pinned_anyway():
    assert set(pins("flower-1.41")) <= set(pins("runtime"))


def test_no_package_is_pinned_twice():
    assert not set(pins("runtime")) & set(pins("dev"))
    assert not set(pins("runtime")) & set(pins("cuda"))


def torch_build(wheels: Path) -> str:
    """What torch-build.sh tells pip where pip finds the wheels of one folder and nothing else."""
    command = [FOLDER / "torch-build.sh", sys.executable, "--no-index", "--find-links", wheels]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("local", ["", "+cpu"])
def test_the_cpu_build_is_asked_for_where_pip_finds_it(tmp_path, local):
    version, _ = pins("runtime")["torch"]
    with zipfile.ZipFile(tmp_path / f"torch-{version}{local}-py3-none-any.whl", "w"):
        pass
    asked = f"--requirement {FOLDER / 'torch-cpu.txt'}" if local else ""
    assert torch_build(tmp_path) == asked
