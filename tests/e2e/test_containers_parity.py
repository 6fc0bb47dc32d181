"""The containers train what a simulation on this machine trains, to the bit."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from medfed import engines, parity, records
from medfed.paths import Home
from tests.e2e.compose_project import Federation
from tests.small_llama import CONFIG as SMALL
from tests.small_llama import sharing_cards

pytestmark = [pytest.mark.containers, pytest.mark.weights]

CONFIG = {**SMALL, "num-server-rounds": 3, "evaluate.holdout-examples": 0}
QUIET = Console(file=io.StringIO())


@pytest.fixture
def home(federation: Federation, tmp_path: Path) -> Home:
    """This machine's cards, and the very model that the containers have."""
    home = sharing_cards(tmp_path / "medfed")
    federation.project.compose("cp", "superlink:/medfed/models/tiny", str(home.models / "tiny"))
    return home


def test_containers_and_simulation_agree_in_every_round_to_the_bit(
    federation: Federation, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in federation.project.environment.items():
        monkeypatch.setenv(name, value)
    engines.in_containers(home, CONFIG, tmp_path / "containers", QUIET)
    engines.simulated(home, CONFIG, tmp_path / "simulation", QUIET)
    found = {name: records.read(tmp_path / name) for name in ("simulation", "containers")}
    tensors = found["simulation"].provenance["adapter"]["tensors"]
    compared = parity.compare(found, tensors)
    assert compared["first_difference"] is None
    assert compared["equal"]
    assert len(compared["engines"]["containers"]["rounds"]) == 3
    assert found["containers"].engine == "deployment"
