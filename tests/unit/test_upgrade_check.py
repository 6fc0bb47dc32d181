"""``medfed doctor`` and ``medfed upgrade check``: what a Flower allows and would change."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from compat import heartbeats, state_database
from medfed import upgrade
from medfed.cli import app as cli
from superlink.database import backups_of
from tests.unit.test_superlink_database import made_at

HOOK = {
    "name": "heartbeats",
    "side": "supernode",
    "active": True,
    "gives": "heartbeats",
    "without": "dead nodes count as online",
    "reasons": [],
}
TARGET = {
    "flower": "1.99.0",
    "supported": ["1.41.0", "1.42.0"],
    "hooks": [HOOK],
    "revisions": ["new"],
    "all_revisions": ["old", "new"],
}


def medfed(*arguments: str):
    return CliRunner().invoke(cli, arguments)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch):
    """Another environment, which answers as it is told."""
    told = dict(TARGET)
    monkeypatch.setattr(upgrade, "_ask", lambda _python: told)
    return told


def test_doctor_lists_every_hook_and_is_content():
    done = medfed("doctor", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)["flower"]
    assert len(found["hooks"]) == 9
    assert all(hook["active"] for hook in found["hooks"])


def test_doctor_says_which_hook_is_off_and_what_it_costs(monkeypatch):
    pins = {"flwr.supercore.heartbeat": {"HeartbeatSender": "0"}}
    monkeypatch.setattr(heartbeats, "HOOK", replace(heartbeats.HOOK, pins=pins))
    done = medfed("doctor")
    assert done.exit_code == 1
    assert "8 of 9 hooks active" in done.stdout
    assert "heartbeats: expected flwr.supercore.heartbeat.HeartbeatSender" in done.stdout


def test_a_migration_is_foretold_with_its_copy_and_nothing_is_changed(target, tmp_path):
    database = made_at(tmp_path / "state.db", "old")
    done = medfed("upgrade", "check", "--database", str(database))
    assert done.exit_code == 0, done.output
    assert f"copied first to {database}.before-new" in done.stdout
    assert "1.99.0, not among those supported (1.41.0, 1.42.0)" in done.stdout
    assert state_database.revisions_of(database) == {"old"}
    assert backups_of(database) == []


def test_a_database_that_stays_as_it_is_is_said_to(target, tmp_path):
    database = made_at(tmp_path / "state.db", "new")
    found = upgrade.check(None, database)
    assert found.database is not None
    assert found.database.backup is None
    assert any("stays as it is" in line for line in found.lines())


def test_no_database_is_no_obstacle(target, tmp_path):
    assert upgrade.check(None, tmp_path / "state.db").obstacles == ()


def test_a_hook_that_would_go_off_is_an_obstacle(target, tmp_path):
    target["hooks"] = [{**HOOK, "active": False, "reasons": ["found it changed"]}]
    done = medfed("upgrade", "check", "--database", str(tmp_path / "state.db"), "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["obstacles"] == ["heartbeats would be off: dead nodes count as online"]
    assert found["off"] == {"heartbeats": ["found it changed"]}


def test_an_older_flower_is_no_way_to_go_for_a_migrated_database(target, tmp_path):
    target |= {"flower": "1.41.0", "revisions": ["old"], "all_revisions": ["old"]}
    database = made_at(tmp_path / "state.db", "new")
    done = medfed("upgrade", "check", "--database", str(database))
    assert done.exit_code == 1
    assert "put the copy back" in done.stdout


def test_this_environment_is_asked_where_no_other_is_named(tmp_path):
    found = upgrade.check(None, tmp_path / "state.db")
    assert found.now == found.then
    assert found.off == {}
    assert "Nothing is in the way" in found.lines()[-1]


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("echo 'No module named flwr' >&2; exit 1", "No module named flwr"),
        ("echo hello", "Expecting value"),
        ("exit 3", "no output"),
    ],
)
def test_an_environment_that_cannot_be_asked_is_one_line(tmp_path, says, reason):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{says}\n")
    python.chmod(0o755)
    done = medfed("upgrade", "check", "--python", str(python))
    assert isinstance(done.exception, upgrade.UpgradeError)
    assert reason in str(done.exception)


def test_an_interpreter_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(upgrade.UpgradeError, match="No such file"):
        upgrade.check(tmp_path / "python", tmp_path / "state.db")
