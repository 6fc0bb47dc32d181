"""A real SuperLink and real SuperNodes over TLS, each SuperNode with its own registered key."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import certs
from common.errors import SuperLinkError, SuperNodeError
from medfed import processes
from medfed.paths import Home
from superlink.control import Control
from supernode import roster

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
COUNT = 3
NAMES = [f"supernode-{i:02d}" for i in range(COUNT)]
SPARE = "supernode-07"  # has a key and a partition, but nobody registered it


def free_port() -> int:
    """A free port with free neighbours, below those that the system gives to clients."""
    while True:
        first = random.randrange(20000, 32000, 10)
        with contextlib.ExitStack() as probes:
            try:
                for port in range(first, first + 1 + COUNT):
                    probes.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
            return first


def until(what: Callable[[], bool], deadline_s: float, message: str) -> None:
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, message
        time.sleep(0.2)


def prepare(root: Path) -> Home:
    home = Home(root)
    for name in (*NAMES, SPARE):
        folder = home.partitions / name
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text('{"instruction": "a", "input": "b", "output": "c"}\n')
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return prepare(tmp_path_factory.mktemp("medfed"))


@pytest.fixture(scope="module")
def up(home: Home) -> Iterator[processes.Up]:
    done = processes.up(home, roster.load(), count=COUNT, port=free_port(), deadline_s=80)
    certs.issue(home.certs, [SPARE])
    yield done
    processes.down(home)
    assert [one.name for one in done.federation.processes if one.find()] == []


def supernode(home: Home, port: int, name: str, **other: str) -> subprocess.CompletedProcess[str]:
    """Start a SuperNode that must refuse to start."""
    flwr_home = home.root / "refused" / name
    arguments = {
        "name": name,
        "superlink": f"127.0.0.1:{port}",
        "ca": str(home.certs / "ca.crt"),
        "key": str(home.certs / "supernodes" / f"{name}.key"),
        "data": str(home.partitions / name),
        "runtime-port": str(free_port()),
        "activation-timeout": "0",
        **other,
    }
    done = subprocess.run(
        [sys.executable, "-m", "supernode", *(f"--{k}={v}" for k, v in arguments.items())],
        cwd=ROOT,
        env={**os.environ, "FLWR_HOME": str(flwr_home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert not flwr_home.exists(), "something was written"
    return done


def test_all_supernodes_come_online_under_their_names(home, up):
    assert up.started == ("superlink", *NAMES)
    found = {one.name: one for one in processes.status(home)}
    assert list(found) == ["superlink", "warm", *NAMES]
    assert all(one.alive and one.online for one in found.values())
    assert all(one.pss and one.pss > 10e6 for one in found.values())


def test_a_second_up_finds_them_running(home, up):
    again = processes.up(home, roster.load(), port=up.federation.port, deadline_s=20)
    assert again.started == ()
    assert again.federation == up.federation


def test_the_healthchecks_observe_the_connection(home, up):
    checks = [["superlink.health", "--ca", str(home.certs / "ca.crt")]]
    checks[0] += ["--port", str(up.federation.port)]
    checks += [["supernode.health"]] * COUNT
    homes = ["", *(str(home.supernodes / name / "flwr") for name in NAMES)]
    for check, flwr_home in zip(checks, homes, strict=True):
        done = subprocess.run(
            [sys.executable, "-m", *check],
            cwd=ROOT,
            env={**os.environ, "FLWR_HOME": flwr_home},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_registering_again_changes_nothing(home, up):
    keys = {name: home.certs / "supernodes" / f"{name}.pub" for name in NAMES}
    with Control(up.federation.address, home.certs / "ca.crt") as control:
        before = control.nodes()
        assert not any(one.new for one in control.register(keys))
        assert [node.node_id for node in control.nodes()] == [node.node_id for node in before]


def test_a_name_cannot_be_taken_over_with_another_key(home, up):
    with Control(up.federation.address, home.certs / "ca.crt") as control:
        with pytest.raises(SuperLinkError, match="registered with another"):
            control.register({NAMES[0]: home.certs / "supernodes" / f"{SPARE}.pub"})
        with pytest.raises(SuperLinkError, match=f"found it registered as {NAMES[0]}"):
            control.register({"stranger": home.certs / "supernodes" / f"{NAMES[0]}.pub"})
        assert [node.name for node in control.nodes()] == NAMES


def test_the_control_client_refuses_the_superlink_of_another_ca(home, up, tmp_path):
    certs.issue(tmp_path / "other", [])
    with (
        Control(up.federation.address, tmp_path / "other" / "ca.crt") as control,
        pytest.raises(SuperLinkError, match="CERTIFICATE_VERIFY_FAILED"),
    ):
        control.nodes()


def test_a_supernode_with_the_wrong_ca_is_refused(home, up, tmp_path):
    certs.issue(tmp_path / "other", [])
    done = supernode(home, up.federation.port, NAMES[0], ca=str(tmp_path / "other" / "ca.crt"))
    assert "found another CA's" in done.stderr


def test_an_unregistered_key_is_refused(home, up):
    done = supernode(home, up.federation.port, SPARE)
    assert f"the key of {SPARE} to be registered" in done.stderr
    assert f"flwr supernode register {SPARE}.pub" in done.stderr


def test_a_second_supernode_with_the_same_key_is_refused(home, up):
    done = supernode(home, up.federation.port, NAMES[2])
    assert "counts as online" in done.stderr
    assert all(one.online for one in processes.status(home))


def test_the_key_of_another_node_is_refused_and_its_owner_named(home, up):
    other = str(home.certs / "supernodes" / f"{NAMES[1]}.key")
    done = supernode(home, up.federation.port, SPARE, key=other)
    assert f"found the key of {NAMES[1]}" in done.stderr


def test_a_partition_outside_the_roster_is_refused(home, up):
    done = supernode(home, up.federation.port, NAMES[0], partition="20")
    assert "from 0 to 19, found 20" in done.stderr


def test_a_supernode_that_was_killed_rejoins_at_once(home, up):
    victim = up.federation.supernodes[0]
    os.kill(victim.pid, signal.SIGKILL)
    os.waitpid(victim.pid, 0)
    again = processes.up(home, roster.load(), port=up.federation.port, deadline_s=40)
    assert again.started == (victim.name,)
    assert again.federation.supernodes[1:] == up.federation.supernodes[1:]
    # It counted as online for the SuperLink all the while: the new process itself must be, too.
    at = home.supernodes / victim.name / "flwr" / "connection.json"
    until(
        lambda: f'"pid": {again.federation.supernodes[0].pid}' in at.read_text(),
        30,
        processes.last_line(Path(victim.log)),
    )
    processes.down(home)
    assert not home.federation.exists()


def test_a_port_in_use_is_refused_and_nothing_is_left(tmp_path):
    home = prepare(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SuperLinkError, match=f"port {port} to be free"):
            processes.up(home, roster.load(), count=1, port=port)
    assert not home.federation.exists()
    assert not home.supernodes.exists()


def test_a_missing_partition_is_refused_before_anything_starts(tmp_path):
    home = prepare(tmp_path)
    (home.partitions / NAMES[1] / "train.jsonl").unlink()
    with pytest.raises(SuperNodeError, match=NAMES[1]) as caught:
        processes.up(home, roster.load(), count=COUNT, port=free_port())
    assert "medfed prepare" in caught.value.hint or "medfed data check" in caught.value.hint
    assert not home.certs.exists()


def test_a_federation_that_cannot_come_up_leaves_nothing_behind(tmp_path, monkeypatch):
    home = prepare(tmp_path)
    # Something changes the key after it was issued: the SuperNode refuses to start.
    issue = certs.issue

    def issue_and_open(*arguments):
        issued = issue(*arguments)
        (home.certs / "supernodes" / f"{NAMES[0]}.key").chmod(0o644)
        return issued

    monkeypatch.setattr(certs, "issue", issue_and_open)
    started: list[processes.Process] = []
    save = processes._save
    monkeypatch.setattr(
        processes, "_save", lambda home, one: (started.extend(one.processes), save(home, one))
    )
    with pytest.raises(processes.FederationError, match=f"{NAMES[0]} to run.*0600"):
        processes.up(home, roster.load(), count=1, port=free_port(), deadline_s=40)
    assert started
    assert [one.name for one in started if one.find()] == []
    assert not home.federation.exists()
