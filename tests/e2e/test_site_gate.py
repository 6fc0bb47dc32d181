"""A site gate in a real federation: what its policy does not allow never reaches the SuperLink.

Two gated SuperNodes, a real SuperLink, TLS. The hospitals have approved an app that does as it is
told (gated_app.py): the gate must hold all the same.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import certs
import certs.files
import certs.keys
import certs.pki
from common.errors import SuperLinkError
from medfed import processes
from medfed.paths import Home
from superlink import health
from superlink.control import Control
from supernode import roster
from supernode.gate import audit, policy
from supernode.gate.site import Site
from tests.e2e.gated_app import GOOD, REFUSED, SIZE, STRANGER, altered, write_app
from tests.e2e.warm_federation import ROOT

pytestmark = pytest.mark.processes

NAMES = ("supernode-00", "supernode-01")
SECRET = "Patient 4711 has a rare disease"


def free_port() -> int:
    while True:
        first = random.randrange(26000, 26990, 10)
        with ExitStack() as probes:
            try:
                for port in range(first, first + 4):
                    probes.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first


def until(what: Callable[[], bool], deadline_s: float, message: Callable[[], str]) -> None:
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, message()
        time.sleep(0.1)


class Gated:
    """The federation with its two sites."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.fab = write_app(root / "app" / "small")
        for name in NAMES:
            folder = self.home.partitions / name
            folder.mkdir(parents=True)
            row = {"instruction": "a", "input": "", "output": SECRET}
            (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
            policy.create(self.site(name).policy, name, SIZE)
            self.site(name).approve(self.fab, "Dr. A", "for the tests")
        self.port = free_port()

    def site(self, name: str) -> Site:
        return Site.at(self.home.sites / name)

    def up(self) -> processes.Up:
        count = len(NAMES)
        return processes.up(self.home, roster.load(), count=count, port=self.port, deadline_s=80)

    def control(self) -> Control:
        return Control(f"127.0.0.1:{self.port}", self.home.certs / "ca.crt")

    def start(self, fab: bytes, **config: str) -> tuple[int, Path]:
        out = self.home.root / f"out-{time.monotonic_ns()}.json"
        with self.control() as control:
            return control.start_run(
                fab, {"out": str(out), "names": " ".join(NAMES), **config}
            ), out

    def run(self, fab: bytes, **config: str) -> list[dict[str, Any]]:
        """Run the app to its end; what its ServerApp was told, round by round and by name."""
        run_id, out = self.start(fab, **config)
        return self.finish(run_id, out)

    def finish(self, run_id: int, out: Path) -> list[dict[str, Any]]:
        with self.control() as control:
            until(lambda: control.run(run_id).finished, 120, lambda: self.log(NAMES[0])[-3000:])
            run = control.run(run_id)
            assert run.status == "completed", "".join(control.logs(run_id)) + run.details
        return json.loads(out.read_text())

    def log(self, name: str) -> str:
        return (self.home.supernodes / name / "supernode.log").read_text()

    def audited(self, name: str) -> list[dict[str, Any]]:
        audit.verify(self.site(name).audit)
        return list(audit.entries(self.site(name).audit))

    def activated(self, name: str) -> datetime | None:
        with self.control() as control:
            (node,) = [node for node in control.nodes() if node.name == name]
        return node.activated

    def all_online(self) -> bool:
        return all(one.alive and one.online for one in processes.status(self.home))


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gated]:
    gated = Gated(tmp_path_factory.mktemp("gated"))
    gated.up()
    yield gated
    processes.down(gated.home)


@pytest.fixture(scope="module")
def rounds(gated: Gated) -> dict[str, dict[str, Any]]:
    """One run: a round for each thing that supernode-00 tries, good ones around them."""
    steps = ["good", *REFUSED, "raise", "last"]
    return dict(zip(steps, gated.run(gated.fab, steps=" ".join(steps)), strict=True))


def test_status_shows_the_gate(gated):
    gates = {one.name: one.gate for one in processes.status(gated.home)}
    assert gates == {"superlink": None, "warm": None, **dict.fromkeys(NAMES, True)}


def test_what_is_allowed_leaves_unchanged(rounds):
    assert rounds["good"] == dict.fromkeys(NAMES, GOOD)


@pytest.mark.parametrize("step", REFUSED)
def test_what_is_not_allowed_becomes_an_error_and_the_round_goes_on(rounds, step):
    error = rounds[step]["supernode-00"]["error"]
    assert error.startswith("site gate of supernode-00: its reply was withheld: ")
    assert REFUSED[step] in error
    assert rounds[step]["supernode-01"] == GOOD


def test_the_words_of_an_apps_error_stay_at_the_hospital(gated, rounds):
    error = rounds["raise"]["supernode-00"]["error"]
    assert error == "the ClientApp raised an exception; its words stay here"
    assert any(SECRET in str(entry.get("detail")) for entry in gated.audited("supernode-00"))


def test_no_word_of_a_record_reached_the_coordinator(gated, rounds):
    assert rounds
    words = SECRET.encode()
    for path in gated.home.superlink.rglob("*"):
        if path.is_file():
            assert words not in path.read_bytes(), path


def test_the_node_lives_on(gated, rounds):
    assert rounds["last"] == dict.fromkeys(NAMES, GOOD)
    assert gated.all_online()


def test_an_identity_is_answered(gated):
    (told,) = gated.run(gated.fab, kind="query", steps="good")
    assert [told[name]["numbers"] for name in NAMES] == [{"partition-id": 0}, {"partition-id": 1}]


def test_every_message_and_decision_is_in_the_log(gated, rounds):
    entries = gated.audited("supernode-00")
    assert entries[0]["event"] == "started"
    replies = [entry for entry in entries if entry["event"] == "reply"]
    decisions = {entry["round"]: entry["decision"] for entry in replies if entry["type"] == "train"}
    expected = ["released", *["refused"] * len(REFUSED), "error", "released"]
    assert [decisions[str(number)] for number in range(len(expected))] == expected
    messages = {entry["message"] for entry in entries if entry["event"] == "message"}
    assert messages == {entry["message"] for entry in replies}
    released = next(entry for entry in replies if entry["decision"] == "released")
    assert released["bytes-out"] > SIZE * 4
    assert released["bytes-in"] > 8 * 4


@pytest.mark.parametrize("other", ["unapproved", "altered by a byte"])
def test_no_other_fab_runs_not_even_one_that_differs_in_a_byte(gated, tmp_path, other):
    stranger = write_app(tmp_path / "small", STRANGER)
    fab = stranger if other == "unapproved" else altered(gated.fab)
    assert fab != gated.fab
    before = set((gated.home.supernodes / NAMES[0] / "flwr").rglob("*.py"))
    (told,) = gated.run(fab, steps="good")
    for name in NAMES:
        assert f"site gate of {name}: the FAB " in told[name]["error"]
        assert "is not approved here" in told[name]["error"]
        assert gated.audited(name)[-1]["decision"] == "refused"
    # It was neither installed nor looked at, and what is approved still runs.
    assert set((gated.home.supernodes / NAMES[0] / "flwr").rglob("*.py")) == before
    assert gated.run(gated.fab, steps="good") == [dict.fromkeys(NAMES, GOOD)]


def test_what_was_approved_later_runs_after_a_restart_and_the_log_goes_on(gated, tmp_path):
    fab = write_app(tmp_path / "small", STRANGER)
    for name in NAMES:
        assert gated.site(name).approve(fab, "Dr. B", "") is not None
    before, activated = gated.audited("supernode-00"), gated.activated("supernode-00")
    victim = next(one for one in processes.load(gated.home).supernodes if one.name == NAMES[0])
    os.kill(victim.pid, signal.SIGKILL)
    os.waitpid(victim.pid, 0)
    gated.up()
    # Its predecessor, which was killed, counts as online for a while: wait for this one.
    until(lambda: gated.activated("supernode-00") != activated, 80, lambda: gated.log(NAMES[0]))
    with gated.control() as control:
        control.wait_online(NAMES, 80)
    (told,) = gated.run(fab, steps="good")
    assert told["supernode-00"] == GOOD
    assert "is not approved here" in told["supernode-01"]["error"]  # it was not restarted
    after = gated.audited("supernode-00")
    assert after[: len(before)] == before
    assert after[len(before)]["event"] == "started"


def taken_up(gated: Gated) -> None:
    """Wait until the SuperLink shows the certificate that is on the disk."""
    at = ("127.0.0.1", gated.port)
    ca, path = str(gated.home.certs / "ca.crt"), gated.home.certs / "superlink.crt"
    until(
        lambda: ssl.get_server_certificate(at, ca_certs=ca).encode() == path.read_bytes(),
        30,
        lambda: (gated.home.superlink / "superlink.log").read_text()[-2000:],
    )


def test_a_certificate_is_renewed_while_a_round_runs(gated):
    waiting = gated.home.root / "waiting"
    run = gated.start(gated.fab, steps=f"wait:{waiting}")
    until(waiting.exists, 60, lambda: gated.log(NAMES[0]))
    before = (gated.home.certs / "superlink.crt").read_bytes()
    certs.renew(gated.home.certs, timedelta(days=366))
    assert (gated.home.certs / "superlink.crt").read_bytes() != before
    taken_up(gated)
    assert health.look("127.0.0.1", gated.port, gated.home.certs / "ca.crt") == (None, [])
    waiting.unlink()
    assert gated.finish(*run) == [dict.fromkeys(NAMES, GOOD)]


def test_the_ca_is_rotated_with_an_overlap(gated):
    old = (gated.home.certs / "ca.crt").read_bytes()
    certs.begin_rotation(gated.home.certs)
    processes.down(gated.home)
    gated.up()  # everybody reads the bundle
    certs.switch_rotation(gated.home.certs)
    taken_up(gated)
    assert gated.run(gated.fab, steps="good") == [dict.fromkeys(NAMES, GOOD)]
    certs.finish_rotation(gated.home.certs)
    assert gated.run(gated.fab, steps="good") == [dict.fromkeys(NAMES, GOOD)]
    assert gated.all_online()
    # Who was not given the new CA no longer takes the SuperLink for the SuperLink.
    stale = gated.home.root / "stale.crt"
    stale.write_bytes(old)
    with (
        Control(f"127.0.0.1:{gated.port}", stale) as control,
        pytest.raises(SuperLinkError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        control.nodes()


def supernode(gated: Gated, name: str, key: Path) -> list[str | Path]:
    """The command that starts a SuperNode as its hospital would."""
    return [
        *(sys.executable, "-m", "supernode", "--name", name),
        *("--superlink", f"127.0.0.1:{gated.port}", "--ca", gated.home.certs / "ca.crt"),
        *("--key", key, "--data", gated.home.partitions / name),
        *("--runtime-port", str(free_port()), "--activation-timeout", "0"),
        *("--site", gated.site(name).folder),
    ]


def test_a_round_in_flight_goes_on_without_a_revoked_institution(gated, monkeypatch, tmp_path):
    """And it does not come back with its old key."""
    from typer.testing import CliRunner

    from medfed.commands.certs import app as certs_app

    name = NAMES[0]
    for half in ("key", "pub"):
        shutil.copy(gated.home.certs / "supernodes" / f"{name}.{half}", tmp_path)
    waiting = gated.home.root / "waiting"
    run = gated.start(gated.fab, steps=f"wait:{waiting} good")
    until(waiting.exists, 60, lambda: gated.log(name))
    monkeypatch.setenv("MEDFED_HOME", str(gated.home.root))
    told = CliRunner().invoke(certs_app, ["revoke", name], catch_exceptions=False).stdout
    assert f"unregistered at 127.0.0.1:{gated.port}" in told
    first, second = gated.finish(*run)
    assert first["supernode-01"] == second["supernode-01"] == GOOD
    # The SuperLink answers what supernode-00 was working on, and does not ask it again.
    assert set(first) == {"supernode-01", "the SuperLink"}
    assert "navailable" in first["the SuperLink"]["error"]
    assert name not in second
    process = next(one for one in processes.load(gated.home).supernodes if one.name == name)
    until(lambda: process.find() is None, 60, lambda: gated.log(name)[-2000:])

    again = subprocess.run(
        supernode(gated, name, tmp_path / f"{name}.key"),
        cwd=ROOT,
        env={**os.environ, "FLWR_HOME": str(tmp_path / "flwr")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert again.returncode == 1
    assert f"expected the key of {name} to be registered" in again.stderr
    with gated.control() as control, pytest.raises(SuperLinkError, match="already in use"):
        control.register({name: tmp_path / f"{name}.pub"})
    assert [one.name for one in gated.up().federation.supernodes] == [NAMES[1]]

    # It comes back with a key of its own making, when somebody says so. Only its .pub travels.
    key, sent = tmp_path / "own" / f"{name}.key", tmp_path / "own" / f"{name}.pub"
    pair = certs.pki.new_key()
    sent.parent.mkdir()
    certs.files.write(key, certs.keys.private_to_openssh(pair), certs.files.PRIVATE)
    sent.write_bytes(certs.keys.public_to_openssh(pair.public_key(), name))
    enrol = ["enrol", name, str(sent), "--readmit"]
    told = CliRunner().invoke(certs_app, enrol, catch_exceptions=False).stdout
    assert f"registered at 127.0.0.1:{gated.port}" in told
    process = subprocess.Popen(
        supernode(gated, name, key),
        cwd=ROOT,
        env={**os.environ, "FLWR_HOME": str(tmp_path / "flwr")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with gated.control() as control:
            control.wait_online(NAMES, 60)
    finally:
        process.terminate()
        process.wait(30)
