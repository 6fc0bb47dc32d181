"""The benchmark of rounds says what is missing before it spends minutes, and keeps its logs."""

from __future__ import annotations

import json
import socket
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import rounds

OPTIONS = Namespace(
    rounds=2, steps=1, batch=1, model="local/m", quantization=0, dataset="local/d", port=21000
)


@pytest.fixture
def port() -> int:
    """A port with free ones above it."""
    for first in range(20_000, 30_000, 400):
        if not any(rounds._listens(one) for one in (first, first + 100, first + 150)):
            return first
    raise AssertionError("no free port")


def test_a_machine_with_everything_passes(monkeypatch, port):
    monkeypatch.setattr(rounds.shutil, "which", lambda _name: "/usr/sbin/nginx")
    assert rounds.preflight(rounds.SIDES, port) == []


def test_no_nginx_is_said_with_a_hint_and_only_where_it_is_needed(monkeypatch, port):
    monkeypatch.setattr(rounds.shutil, "which", lambda _name: None)
    (problem,) = rounds.preflight(["deployment"], port)
    assert "expected nginx" in problem
    assert "hint: apt-get install" in problem
    assert rounds.preflight(["stock", "simulation"], port) == []


@pytest.mark.parametrize(("offset", "side"), [(3, "stock"), (100, "deployment")])
def test_a_port_in_use_is_named_before_anything_starts(monkeypatch, port, offset, side):
    monkeypatch.setattr(rounds.shutil, "which", lambda _name: "/usr/sbin/nginx")
    with socket.create_server(("127.0.0.1", port + offset)):
        (problem,) = rounds.preflight([side], port)
        assert str(port + offset) in problem
        assert rounds.preflight(["simulation"], port) == []


def test_an_interpreter_without_flower_is_said_before_anything_starts(monkeypatch, port, tmp_path):
    monkeypatch.setattr(rounds.shutil, "which", lambda _name: "/usr/sbin/nginx")
    assert rounds.preflight(["deployment"], port, Path(sys.executable)) == []
    (problem,) = rounds.preflight(["deployment"], port, tmp_path / "nothing")
    assert f"expected an interpreter with Flower in {tmp_path / 'nothing'}" in problem
    assert "hint: make setup-oldest" in problem


def test_the_command_stops_at_once_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr(rounds, "preflight", lambda *_: ["expected nginx, found none"])
    monkeypatch.setattr(sys, "argv", ["rounds"])
    assert rounds.main() == 1
    assert "error: expected nginx, found none" in capsys.readouterr().err


def test_logs_of_a_failure_stay_and_others_go(capsys):
    with rounds.scratch_folder() as good:
        (good / "log").write_text("fine")
    assert not good.exists()
    with pytest.raises(SystemExit), rounds.scratch_folder() as bad:
        (bad / "log").write_text("why")
        raise SystemExit("error: the run is failed")
    assert (bad / "log").read_text() == "why"
    assert str(bad) in capsys.readouterr().err
    (bad / "log").unlink()
    bad.rmdir()


def test_another_environment_measures_with_the_same_settings(tmp_path: Path):
    told = {"flower": "1.41.0", "deployment": {"overhead_s": 2.0}}
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{json.dumps(told)}'\n")
    python.chmod(0o755)
    assert rounds.against(python, OPTIONS) == {"flower": "1.41.0", "overhead_s": 2.0}
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("-m benchmarks.rounds --only deployment --json --rounds 2 --steps 1")


def test_another_environment_that_fails_is_said(tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit, match="could not measure"):
        rounds.against(python, OPTIONS)
