"""A run's folder: the same one for a run and for the runs that go on with it."""

from __future__ import annotations

import json

import pytest

from app.errors import AppError
from app.server import run_record
from app.server.communication import Communication
from app.server.run_record import RunRecord
from tests.run_configs import default_config


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    return tmp_path


def config(**overrides):
    return default_config(**{key.replace("_", "-"): value for key, value in overrides.items()})


def test_a_run_that_goes_on_has_the_earlier_ones_folder_under_both_ids(home):
    RunRecord.open(7, config()).event("round-finished", round=1)
    RunRecord.open(8, config(resume_run="7")).event("resumed", after_round=1)
    for run in ("7", "8"):
        events = (home / "runs" / run / "events.jsonl").read_text().splitlines()
        assert [json.loads(event)["event"] for event in events] == ["round-finished", "resumed"]


def test_two_serverapps_cannot_write_one_run(monkeypatch):
    monkeypatch.setattr(run_record, "_LOCK_S", 0.0)
    first = RunRecord.open(7, config())
    with pytest.raises(AppError, match="only ServerApp"):
        RunRecord.open(8, config(resume_run="7"))
    del first
    RunRecord.open(8, config(resume_run="7"))


def test_a_serverapp_that_was_restarted_finds_its_own_folder(home):
    RunRecord.open(7, config()).event("round-finished", round=1)
    assert RunRecord.open(7, config()).folder == (home / "runs" / "7").resolve()


def test_a_third_run_goes_on_with_the_second(home):
    RunRecord.open(7, config())
    RunRecord.open(8, config(resume_run="7"))
    assert RunRecord.open(9, config(resume_run="8")).folder.name == "7"


def test_a_run_that_is_not_there_cannot_go_on():
    with pytest.raises(AppError, match=r"expected a run in .*/runs/6, found none"):
        RunRecord.open(7, config(resume_run="6"))


@pytest.mark.parametrize(
    ("key", "value"), [("train.seed", 43), ("num-server-rounds", 100), ("strategy.name", "Krum")]
)
def test_another_run_cannot_go_on_with_this_one(key, value):
    RunRecord.open(7, config())
    with pytest.raises(AppError, match=key):
        RunRecord.open(8, default_config(**{key: value, "resume-run": "7"}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("rounds.deadline-s", 60), ("replies.quarantine-after", 9), ("strategy.wait-for-nodes-s", 5)],
)
def test_how_long_it_waits_may_change_on_the_way(key, value):
    RunRecord.open(7, config())
    RunRecord.open(8, default_config(**{key: value, "resume-run": "7"}))


def test_what_was_counted_of_a_round_that_is_done_again_is_counted_once(tmp_path):
    file = tmp_path / "comm_cost.txt"
    before = Communication(file)
    for count in (100, 200, 300):
        before.add(count)
    again = Communication(file, total=300, lines=2)
    again.add(300)
    undisturbed = Communication(tmp_path / "undisturbed.txt")
    for count in (100, 200, 300):
        undisturbed.add(count)
    assert file.read_text() == (tmp_path / "undisturbed.txt").read_text()
    assert again.total == 600
