"""What outlasts the death of a process, in a real federation: TLS, node keys, SQLite."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from superlink.control import Run
from tests.e2e.warm_federation import Federation, write_app

pytestmark = pytest.mark.processes

# Well under the minute in which stock Flower notices a death, where it notices it at all.
SOON_S = 40.0
LONG_S = 180.0

# Counts its own starts; asks once, and pulls the answers to what an earlier start has asked.
SERVER = """
import json, os, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    folder = Path(config["out"])
    with (folder / "starts").open("a") as starts:
        starts.write(json.dumps({"pid": os.getpid(), "run": grid.run.run_id}) + "\\n")
    asked = folder / "asked.json"
    if not asked.exists():
        while len(nodes := list(grid.get_nodes())) < int(config["sample"]):
            time.sleep(0.2)
        ask = ConfigRecord({"out": config["out"]})
        messages = [
            Message(RecordDict({"ask": ask}), dst_node_id=node.node_id, message_type="train")
            for node in nodes
        ]
        asked.write_text(json.dumps(list(grid.push_messages(messages))))
    missing = json.loads(asked.read_text())
    answers = []
    while missing:
        for reply in grid.pull_messages(missing):
            missing.remove(reply.metadata.reply_to_message_id)
            told = reply.error.reason if reply.has_error() else reply.content["told"]["name"]
            answers.append(told)
        time.sleep(0.2)
    (folder / "answers.json").write_text(json.dumps(sorted(answers)))
"""

# Trains until it is told that it has trained enough.
CLIENT = """
import time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    name = context.node_config["name"]
    folder = Path(message.content["ask"]["out"])
    with (folder / f"trained-{name}").open("a") as trained:
        trained.write("once\\n")
    while not (folder / "enough").exists():
        time.sleep(0.1)
    return Message(RecordDict({"told": ConfigRecord({"name": name})}), reply_to=message)
"""

# Instead of flwr-clientapp: where a file says so it dies before it has done anything.
DEATH_AT_THE_START = """#!/bin/sh
[ -e "$FLWR_HOME/die" ] && kill -9 $$
exec {programs}/flwr-clientapp "$@"
"""


def until(what: str, condition: Callable[[], Any], seconds: float = LONG_S) -> Any:
    """What ``condition`` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    home = tmp_path_factory.mktemp("survival")
    programs = home / "programs"
    programs.mkdir()
    stand_in = programs / "flwr-clientapp"
    stand_in.write_text(DEATH_AT_THE_START.format(programs=Path(sys.executable).parent))
    stand_in.chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    with Federation(home, 2, environment={"PATH": path}) as started:
        yield started


class Started:
    """A run of the app above, and what it has written down so far."""

    def __init__(self, federation: Federation, folder: Path, **config: Any) -> None:
        self.federation, self.folder = federation, folder
        folder.mkdir()
        app = write_app(folder / "app", server=SERVER, client=CLIENT)
        with federation.control() as control:
            self.run_id = control.start_run(
                build_fab_from_disk(app), {"out": str(folder), **config}
            )

    def starts(self) -> list[dict[str, int]]:
        file = self.folder / "starts"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def trained(self) -> dict[str, int]:
        return {
            file.name.removeprefix("trained-"): len(file.read_text().splitlines())
            for file in self.folder.glob("trained-*")
        }

    def in_training(self) -> Started:
        until("both train", lambda: len(self.trained()) == 2)
        return self

    def let_them_finish(self) -> None:
        (self.folder / "enough").touch()

    def status(self) -> Run:
        with self.federation.control() as control:
            return control.run(self.run_id)

    def finished(self) -> Run:
        until(f"run {self.run_id} ends", lambda: self.status().finished)
        return self.status()

    def answers(self) -> list[str]:
        return json.loads((self.folder / "answers.json").read_text())


def errors(rounds: list[dict[str, Any]]) -> dict[str, str]:
    told = [reply for one in rounds for reply in one["replies"]]
    assert len(told) == 2, "an institution that does not answer in time has no line here"
    return {reply.get("name", "the dead one's"): reply["error"] for reply in told}


def test_a_clientapp_killed_before_its_first_heartbeat_answers_with_an_error(federation, tmp_path):
    doomed = federation.home / "flwr" / "supernode-00" / "die"
    doomed.touch()
    try:
        told = errors(federation.run(write_app(tmp_path / "app"), rounds=1, timeout=SOON_S))
    finally:
        doomed.unlink()
    assert told["supernode-01"] == ""
    assert "killed by SIGKILL" in told["the dead one's"]


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("kill", "killed by SIGKILL"),
        ("segfault", "killed by SIGSEGV"),
        ("exit", "exit status 7"),
        ("terminate", "exit status"),
    ],
)
def test_a_clientapp_that_dies_in_training_answers_with_an_error(federation, tmp_path, what, how):
    app = write_app(tmp_path / "app")
    config = {"what": what, "target": "supernode-00", "timeout": SOON_S}
    told = errors(federation.run(app, rounds=1, **config))
    assert told["supernode-01"] == ""
    assert f"the ClientApp ended without an answer: {how}" in told["the dead one's"]


def test_the_institution_of_a_dead_clientapp_answers_the_next_round(federation, tmp_path):
    told = errors(federation.run(write_app(tmp_path / "app"), rounds=1, timeout=SOON_S))
    assert told == {"supernode-00": "", "supernode-01": ""}


def test_a_killed_serverapp_is_started_again_and_nothing_is_trained_twice(federation, tmp_path):
    run = Started(federation, tmp_path / "run").in_training()
    os.kill(run.starts()[0]["pid"], signal.SIGKILL)
    until("the ServerApp is started again", lambda: len(run.starts()) == 2, SOON_S)
    run.let_them_finish()
    assert run.finished().status == "completed"
    assert [start["run"] for start in run.starts()] == [run.run_id] * 2
    assert run.answers() == ["supernode-00", "supernode-01"]
    assert run.trained() == {"supernode-00": 1, "supernode-01": 1}


def test_replies_are_taken_while_the_serverapp_is_started_again(federation, tmp_path):
    run = Started(federation, tmp_path / "run").in_training()
    os.kill(run.starts()[0]["pid"], signal.SIGKILL)
    run.let_them_finish()
    assert run.finished().status == "completed"
    assert run.answers() == ["supernode-00", "supernode-01"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
def test_a_superlink_comes_back_with_its_nodes_and_its_unfinished_run(federation, tmp_path, how):
    run = Started(federation, tmp_path / "run").in_training()
    federation.end("superlink", how)
    run.let_them_finish()
    federation.start_superlink()
    until("the ServerApp is started again", lambda: len(run.starts()) == 2, SOON_S)
    assert run.finished().status == "completed"
    assert run.answers() == ["supernode-00", "supernode-01"]
    assert run.trained() == {"supernode-00": 1, "supernode-01": 1}
    with federation.control() as control:
        control.wait_online(federation.names, SOON_S)


def test_a_run_that_was_stopped_stays_stopped(federation, tmp_path):
    run = Started(federation, tmp_path / "run").in_training()
    with federation.control() as control:
        control.stop_run(run.run_id)
    run.let_them_finish()
    assert run.finished().status == "stopped"
    federation.end("superlink")
    federation.start_superlink()
    after = Started(federation, tmp_path / "after")
    after.let_them_finish()
    assert after.finished().status == "completed"
    assert len(run.starts()) == 1
    assert run.status().status == "stopped"
