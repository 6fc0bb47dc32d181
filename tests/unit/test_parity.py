"""Parity: what is compared, and what is said of the first difference."""

from __future__ import annotations

import json

import numpy as np
import pytest
from rich.console import Console

from medfed import engines, parity, records
from medfed.parity import ParityError
from medfed.paths import Home
from supernode import roster
from tests.run_records import MANIFEST, NAMES, adapter, write_record

TENSORS = [name for name, _ in MANIFEST.shapes]


def compared(tmp_path, **other):
    one = records.read(write_record(tmp_path / "one"))
    two = records.read(write_record(tmp_path / "two", **other))
    return parity.compare({"simulation": one, "processes": two}, TENSORS)


def test_two_runs_that_did_the_same_are_equal(tmp_path):
    found = compared(tmp_path)
    assert found["equal"]
    assert found["first_difference"] is None
    traces = list(found["engines"].values())
    assert traces[0] == traces[1]
    assert [one["round"] for one in traces[0]["rounds"]] == [1, 2, 3]
    assert traces[0]["adapter_sha256"] == traces[0]["rounds"][-1]["adapter_sha256"]


def test_one_other_tensor_of_one_reply_is_named_with_its_round_and_institution(tmp_path):
    changed = adapter(200 + 3).copy()
    changed[6] = np.nextafter(changed[6], np.float32(9))  # the last bit of lora_B's first number
    found = compared(tmp_path, replies={(2, NAMES[3]): changed})
    assert not found["equal"]
    difference = found["first_difference"]
    assert difference["engines"] == ["simulation", "processes"]
    assert (difference["round"], difference["institution"]) == (2, NAMES[3])
    assert difference["tensor"] == "layer.lora_B.weight"


def test_other_institutions_are_told_before_their_replies(tmp_path):
    found = compared(tmp_path, asked={2: [NAMES[7], NAMES[8]]})
    difference = found["first_difference"]
    assert (difference["round"], difference["what"]) == (2, "institutions asked")
    assert difference["found"] == [NAMES[2:4], NAMES[7:9]]


def test_other_cards_are_told_as_such(tmp_path):
    write_record(tmp_path / "two")
    events = tmp_path / "two" / "events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    for event in lines:
        if event.get("institution") == NAMES[2] and event["round"] == 1:
            event["partition_fingerprint"] += 1
    events.write_text("".join(json.dumps(event) + "\n" for event in lines))
    one = records.read(write_record(tmp_path / "one"))
    found = parity.compare({"a": one, "b": records.read(tmp_path / "two")}, TENSORS)
    assert found["first_difference"]["what"] == "cards"
    assert found["first_difference"]["institution"] == NAMES[2]


def test_a_run_with_fewer_rounds_is_not_equal(tmp_path):
    found = compared(tmp_path, rounds=2)
    assert found["first_difference"]["what"] == "number of rounds"
    assert found["first_difference"]["found"] == [3, 2]


def fake_engine(**record):
    def run(home, config, keep, console, **more):
        write_record(keep, config=dict(config), **record)

    return run


@pytest.fixture
def faked(monkeypatch):
    for name in engines.ENGINES:
        monkeypatch.setitem(engines.ENGINES, name, fake_engine())


def prove(tmp_path, chosen, **options):
    settings = {"disturb": None, "console": Console(stderr=True), **options}
    return parity.prove(Home(tmp_path), {"train.seed": 7}, chosen, **settings)


def test_records_and_result_stay_in_the_home(tmp_path, faked):
    result = prove(tmp_path, ["simulation", "processes", "containers"])
    (file,) = (tmp_path / "parity").glob("*/parity.json")
    assert json.loads(file.read_text()) == result
    assert result["equal"]
    assert result["config"]["train.seed"] == 7
    assert {path.name for path in file.parent.iterdir()} == {
        "simulation",
        "processes",
        "containers",
        "parity.json",
    }


def test_a_comparison_of_another_app_or_of_unequal_engines_proves_nothing(tmp_path, faked):
    assert parity.proof_of(Home(tmp_path), "a" * 64) is None
    prove(tmp_path, ["simulation", "processes"])
    assert parity.proof_of(Home(tmp_path), "a" * 64) is not None
    assert parity.proof_of(Home(tmp_path), "b" * 64) is None


def test_unequal_engines_prove_nothing(tmp_path, faked, monkeypatch):
    other = fake_engine(replies={(1, NAMES[1]): adapter(1)})
    monkeypatch.setitem(engines.ENGINES, "processes", other)
    assert not prove(tmp_path, ["simulation", "processes"])["equal"]
    assert parity.proof_of(Home(tmp_path), "a" * 64) is None


@pytest.mark.parametrize("chosen", [["simulation"], [], ["simulation", "spark"], ["a", "a"]])
def test_less_than_two_known_engines_are_refused(tmp_path, chosen):
    with pytest.raises(ParityError, match="expected two or more of simulation"):
        prove(tmp_path, chosen)


def test_only_processes_can_be_disturbed(tmp_path):
    with pytest.raises(ParityError, match="supernode-01 gets another seed"):
        prove(tmp_path, ["simulation", "containers"], disturb="supernode-01")


def test_another_seed_is_the_neighbour_s_number_and_nothing_else(tmp_path):
    usual = roster.load()
    changed = roster.load(parity.roster_with_another_seed(tmp_path / "r.toml", "supernode-03"))
    assert changed.names == usual.names
    numbers = {entry.name: entry.partition for entry in changed.supernodes}
    assert {n for n in usual.names if numbers[n] != usual.entry(n).partition} == {
        "supernode-00",
        "supernode-03",
    }
    assert [e.cpus for e in changed.supernodes] == [e.cpus for e in usual.supernodes]
