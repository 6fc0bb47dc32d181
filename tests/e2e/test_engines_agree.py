"""The same config in simulation and on SuperNodes: the same bits; with another seed, not."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from medfed import engines, parity, records
from medfed.cli import app as cli
from medfed.communication import of_run
from medfed.paths import Home
from medfed.runs import run
from medfed.simulation import simulation
from superlink.control import Control
from tests.small_llama import CONFIG as SMALL
from tests.small_llama import small_home

pytestmark = [pytest.mark.processes, pytest.mark.weights]

CONFIG = {**SMALL, "num-server-rounds": 3, "evaluate.holdout-examples": 8}
QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return small_home(tmp_path_factory.mktemp("medfed"))


@pytest.fixture(scope="module")
def proven(home: Home) -> dict[str, object]:
    """What ``medfed parity`` found, by its own command."""
    overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in CONFIG.items())
    command = ["parity", "--rounds", "3", "--engines", "simulation,processes", "--json"]
    done = CliRunner().invoke(cli, [*command, "-c", overrides], env={"MEDFED_HOME": str(home.root)})
    assert done.exit_code == 0, (done.output, done.exception)
    return dict(json.loads(done.stdout))


def test_simulation_and_processes_agree_in_every_round_to_the_bit(proven):
    assert proven["equal"]
    assert proven["first_difference"] is None
    simulated, deployed = (proven["engines"][name] for name in ("simulation", "processes"))
    assert simulated == deployed
    assert [one["round"] for one in simulated["rounds"]] == [1, 2, 3]
    assert len({one["adapter_sha256"] for one in simulated["rounds"]}) == 3
    assert all(len(one["replies"]) == 2 for one in simulated["rounds"])


def test_each_record_says_which_engine_it_came_from(proven):
    folder = Path(str(proven["folder"]))
    assert records.read(folder / "simulation").engine == "simulation"
    assert records.read(folder / "processes").engine == "deployment"


def test_another_seed_of_one_institution_is_found_with_round_institution_and_tensor(
    home, proven, tmp_path
):
    simulated = records.read(Path(str(proven["folder"])) / "simulation")
    victim = simulated.rounds[1].institutions[-1]  # it first trains in round 2
    earlier = simulated.rounds[0].institutions
    assert victim not in earlier
    roster = parity.roster_with_another_seed(tmp_path / "roster.toml", victim)
    engines.as_processes(home, CONFIG, tmp_path / "disturbed", QUIET, roster_path=roster)
    found = {"simulation": simulated, "processes": records.read(tmp_path / "disturbed")}
    tensors = simulated.provenance["adapter"]["tensors"]
    compared = parity.compare(found, tensors)
    assert not compared["equal"]
    difference = compared["first_difference"]
    assert (difference["round"], difference["what"]) == (2, "reply")
    assert difference["institution"] == victim
    assert difference["tensor"] in tensors


def test_a_simulation_repeats_itself_and_another_seed_does_not(home, proven):
    before = proven["engines"]["simulation"]["adapter_sha256"]
    with simulation(home) as address, Control(address) as control:
        again = run(control, home, CONFIG, QUIET, simulate=20)
        other = run(control, home, {**CONFIG, "train.seed": 43}, QUIET, simulate=20)
    assert again.summary["adapter_sha256"] == before
    assert other.summary["adapter_sha256"] != before
    # Nothing crosses a wire in a simulation, and nobody says that something did.
    assert of_run(home, records.read(again.folder))["wire"] is None
