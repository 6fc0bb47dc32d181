"""The mechanics of the warm start: launcher, warm process, child, supervisor, registry.

Flower's own ``flwr-clientapp`` is played by a package that each test's children import, so that
nothing heavy is loaded here; ``tests/e2e/test_warm_clientapp.py`` uses the real one.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import SuperNodeError
from supernode.command import WARM_BIN
from supernode.warm import child, preload, server, supervisor

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 20.0

# Plays `flwr.supernode.cli`: does what the first argument says.
CLIENTAPP = """
import ctypes, json, os, random, signal, sys, time

SEEN = []

def flwr_clientapp():
    SEEN.append(1)
    what, *rest = sys.argv[1:]
    if what == "tell":
        mask = os.umask(0); os.umask(mask)
        told = {
            "argv": sys.argv, "pid": os.getpid(), "cwd": os.getcwd(), "umask": mask,
            "variable": os.environ.get("VARIABLE"), "path": sys.path, "seen": len(SEEN),
            "main": sys.modules["__main__"].__dict__.get("__file__"), "stdin": sys.stdin.read(),
            "supernode": [m for m in sys.modules if m.split(".")[0] == "supernode"],
            "random": random.random(), "handler": int(signal.getsignal(signal.SIGTERM)),
            "fds": sorted(int(f) for f in os.listdir("/proc/self/fd")),
        }
        print(json.dumps(told))
        print("to stderr", file=sys.stderr)
    elif what == "exit":
        sys.exit(int(rest[0]))
    elif what == "exit-text":
        sys.exit("a reason")
    elif what == "os._exit":
        os._exit(int(rest[0]))
    elif what == "raise":
        raise ValueError("a bug in an app")
    elif what == "signal":
        os.kill(os.getpid(), int(rest[0]))
    elif what == "segfault":
        ctypes.string_at(0)
    elif what == "wait":
        def stop(*_):
            sys.exit(3)
        signal.signal(signal.SIGTERM, stop)
        print(os.getpid(), flush=True)
        while True:
            time.sleep(0.1)  # a signal on the way into a longer sleep would wait for its end
"""


def eventually(is_so: Callable[[], Any]) -> Any:
    end = time.monotonic() + DEADLINE_S
    while not (value := is_so()):
        assert time.monotonic() < end, "not so within the deadline"
        time.sleep(0.01)
    return value


def lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


class Host:
    """A folder with a warm process's socket and a stand-in for Flower."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = home / "warm" / "socket"
        package = home / "site" / "flwr" / "supernode"
        package.mkdir(parents=True)
        (package.parent / "__init__.py").write_text("")
        (package / "__init__.py").write_text("")
        (package / "cli.py").write_text(CLIENTAPP)
        (home / "bin").mkdir()
        cold = home / "bin" / "flwr-clientapp"
        cold.write_text('#!/bin/sh\necho "cold $*"\nexit 5\n')
        cold.chmod(0o755)
        (home / "bin" / "python").symlink_to(sys.executable)
        self.process: subprocess.Popen[bytes] | None = None

    def warm_up(self, *options: str) -> None:
        with (self.home / "warm.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "supernode.warm", "once"),
                    *("--socket", str(self.path), "--import", "json"),
                    *options,
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        assert supervisor.wait_until_ready(self.path, DEADLINE_S), self.log()

    def cool_down(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        return (self.home / "warm.log").read_text()

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[str]:
        python = self.home / "bin" / "python" if more.pop("cold", False) else sys.executable
        environment = {
            "MEDFED_WARM_SOCKET": str(self.path),
            "MEDFED_WARM_PYTHON": str(python),
            "PYTHONPATH": str(self.home / "site"),
            "VARIABLE": "of this message",
        }
        if idle := more.pop("idle", ""):
            environment["MEDFED_WARM_IDLE_S"] = idle
        return subprocess.Popen(
            [str(WARM_BIN / "flwr-clientapp"), *arguments],
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **more,
        )

    def run(self, *arguments: str, **more: Any) -> tuple[int, str, str]:
        launcher = self.start(*arguments, **more)
        out, err = launcher.communicate(timeout=DEADLINE_S)
        return launcher.returncode, out, err

    def told(self, **more: Any) -> dict[str, Any]:
        status, out, err = self.run("tell", "--flag", "value", **more)
        assert status == 0, err
        return dict(json.loads(out))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("warm"))
    host.warm_up()
    yield host
    host.cool_down()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Host]:
    """A host whose warm process a test may kill."""
    host = Host(tmp_path)
    yield host
    host.cool_down()


# --- one message ----------------------------------------------------------------------------------


def test_a_message_gets_the_launchers_arguments_environment_folder_and_streams(warm, tmp_path):
    told = warm.told(cwd=tmp_path, umask=0o027)
    assert told["argv"][1:] == ["tell", "--flag", "value"]
    assert told["argv"][0].endswith("/flwr-clientapp")
    assert told["variable"] == "of this message"
    assert told["cwd"] == str(tmp_path)
    assert told["umask"] == 0o027
    assert told["stdin"] == ""
    assert warm.run("tell")[2] == "to stderr\n"


def test_a_message_finds_what_a_cold_start_would_find_and_nothing_of_this_repository(warm):
    told = warm.told()
    assert told["path"] == [
        str(Path(sys.executable).parent),
        str(warm.home / "site"),
        *server.cold_search_path(),
    ]
    assert told["supernode"] == []
    assert told["main"] == told["argv"][0]
    assert told["handler"] == signal.SIG_DFL


def test_a_message_inherits_no_descriptor_of_the_warm_process(warm):
    assert set(warm.told()["fds"]) <= {0, 1, 2, 3}  # 3: the listing itself


def test_nothing_is_carried_over_from_one_message_to_the_next(warm):
    first, second = warm.told(), warm.told()
    assert (first["seen"], second["seen"]) == (1, 1)
    assert first["pid"] != second["pid"]
    assert first["random"] != second["random"]


@pytest.mark.parametrize("what", [("exit", "0"), ("exit", "7"), ("os._exit", "9")])
def test_the_launcher_ends_with_the_childs_status(warm, what):
    assert warm.run(*what)[0] == int(what[1])


def test_what_a_program_says_when_it_exits_is_said(warm):
    assert warm.run("exit-text") == (1, "", "a reason\n")


def test_an_exception_is_shown_as_python_shows_it(warm):
    status, _, err = warm.run("raise")
    assert status == 1
    assert err.endswith("ValueError: a bug in an app\n")


@pytest.mark.parametrize(
    ("what", "number"),
    [
        (("signal", "9"), signal.SIGKILL),
        (("signal", "15"), signal.SIGTERM),
        (("segfault",), signal.SIGSEGV),
    ],
)
def test_a_message_that_dies_takes_only_its_launcher_along(warm, what, number):
    assert warm.run(*what)[0] == -number
    assert warm.told()["seen"] == 1


def test_a_signal_to_the_launcher_reaches_the_message(warm):
    launcher = warm.start("wait")
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(DEADLINE_S) == 3
    eventually(lambda: not lives(pid))


def test_a_launcher_that_is_killed_takes_its_message_along(warm):
    launcher = warm.start("wait")
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    launcher.kill()
    eventually(lambda: not lives(pid))
    assert warm.told()["seen"] == 1


def test_many_messages_at_once_do_not_disturb_each_other(warm):
    launchers = [warm.start("exit", str(number)) for number in range(12)]
    for launcher in launchers:
        launcher.communicate(timeout=DEADLINE_S)
    assert [launcher.returncode for launcher in launchers] == list(range(12))


# --- no warm process ------------------------------------------------------------------------------


def test_without_a_warm_process_a_message_starts_cold_and_says_so(own):
    status, out, err = own.run("tell", "me", cold=True)
    assert (status, out) == (5, "cold tell me\n")
    assert err.startswith("flwr-clientapp: cold start, for the warm process did not take this")
    assert str(own.path) in err


def test_a_socket_that_nobody_serves_means_a_cold_start(own):
    own.warm_up()
    own.cool_down()
    assert own.path.exists()
    assert own.run("tell", cold=True)[:2] == (5, "cold tell\n")


def test_a_message_that_cannot_be_handed_over_starts_cold(own):
    own.warm_up()
    (own.home / "gone").mkdir()
    in_a_removed_folder = f"cd {own.home}/gone && rmdir {own.home}/gone && exec"
    done = subprocess.run(
        ["/bin/sh", "-c", f"{in_a_removed_folder} {WARM_BIN}/flwr-clientapp tell"],
        env={
            "MEDFED_WARM_SOCKET": str(own.path),
            "MEDFED_WARM_PYTHON": str(own.home / "bin" / "python"),
        },
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.stdout == "cold tell\n"
    assert "No such file" in done.stderr


def test_a_cold_start_leaves_a_warm_process_behind_where_it_is_asked_to(own):
    asked = own.home / "asked"
    python = own.home / "bin" / "python"
    python.unlink()
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\necho "$@" >{asked}\n'
    )
    python.chmod(0o755)
    assert own.run("tell", cold=True)[1] == "cold tell\n"
    assert not asked.exists()
    assert own.run("tell", cold=True, idle="600")[1] == "cold tell\n"
    eventually(asked.exists)
    assert asked.read_text() == "-m supernode.warm once --idle 600\n"


def test_a_warm_process_without_messages_ends_and_takes_its_socket_away(own):
    own.warm_up("--idle", "1.0")
    assert own.told()["variable"] == "of this message"
    assert own.process.wait(DEADLINE_S) == 0
    assert "no message for 1 s: ending" in own.log()
    assert not own.path.exists()


def test_a_second_warm_process_left_behind_gives_way_to_the_first(own):
    own.warm_up("--idle", "60")
    done = subprocess.run(
        [sys.executable, "-m", "supernode.warm", "once", "--idle", "60", "--socket", own.path],
        cwd=ROOT,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0
    assert own.told()["variable"] == "of this message"


def test_a_message_at_work_outlives_the_warm_process(own):
    own.warm_up()
    launcher = own.start("wait")
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    own.cool_down()
    assert lives(pid)
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=DEADLINE_S)
    assert (launcher.returncode, out) == (1, "")
    assert "its exit status is unknown" in err
    assert not lives(pid)


def test_a_warm_process_that_is_told_to_stop_takes_its_socket_away(own):
    own.warm_up()
    assert own.process is not None
    own.process.terminate()
    assert own.process.wait(DEADLINE_S) == 0
    assert not own.path.exists()


def test_a_stranger_that_says_nothing_useful_is_refused(own):
    own.warm_up()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(DEADLINE_S)
        stranger.connect(str(own.path))
        stranger.sendall(b"\0\0\0\4junk")
        assert b"refused" in stranger.recv(1000)


def test_only_the_owner_may_reach_the_socket(tmp_path):
    path = tmp_path / "new" / "socket"
    with server.listen(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_another_users_request_is_refused(monkeypatch):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(ValueError, match="expected a launcher of user 12345"):
            child.read_request(ours)


# --- the supervisor -------------------------------------------------------------------------------


def test_a_warm_process_that_dies_is_started_again(tmp_path):
    starts = tmp_path / "starts"
    again = supervisor.Supervisor(
        ["/bin/sh", "-c", f"echo x >> {starts}; exit 1"], waits=lambda: iter([0.01] * 1000)
    )
    thread = threading.Thread(target=again.run)
    thread.start()
    eventually(lambda: starts.exists() and starts.read_text().count("x") >= 3)
    again.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_a_supervisor_that_stops_ends_its_process():
    once = supervisor.Supervisor(["/bin/sleep", "60"])
    thread = threading.Thread(target=once.run)
    thread.start()
    eventually(lambda: once._process is not None)
    once.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_failing_starts_come_further_and_further_apart():
    seen = list(itertools.islice(supervisor.RESTARTS.waits(), 8))
    assert seen == [1, 2, 4, 8, 16, 32, 60, 60]


def test_whether_a_warm_process_answers_can_be_asked(warm, own):
    ask = [sys.executable, "-m", "supernode.warm", "status", "--json", "--socket"]
    there = subprocess.run([*ask, str(warm.path)], cwd=ROOT, capture_output=True, check=False)
    away = subprocess.run([*ask, str(own.path)], cwd=ROOT, capture_output=True, check=False)
    assert (there.returncode, json.loads(there.stdout)["ready"]) == (0, True)
    assert (away.returncode, json.loads(away.stdout)["ready"]) == (1, False)


# --- what is ready --------------------------------------------------------------------------------


def test_a_second_thread_before_the_fork_is_refused():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="a-pool")
    thread.start()
    try:
        with pytest.raises(SuperNodeError, match="expected one thread after this, found"):
            preload.check_fit_for_forking("this")
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("text", "source", "bits"),
    [("org/model", "org/model", 0), ("org/model@4", "org/model", 4), ("a@8", "a", 8)],
)
def test_a_model_is_named_with_its_bits(text, source, bits):
    assert preload.ModelSource.parse(text) == preload.ModelSource(source, bits)


def test_a_local_model_is_looked_for_in_medfeds_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    with pytest.raises(SuperNodeError, match=r"found no config\.json"):
        preload.ModelSource.parse("local/small@4")
    folder = tmp_path / "models" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert preload.ModelSource.parse("local/small@4").source == str(folder)


@pytest.mark.parametrize("text", ["model@5", "model@four", "model@4@4"])
def test_other_bits_are_refused(text):
    with pytest.raises(SuperNodeError, match="expected a model as NAME or NAME@BITS"):
        preload.ModelSource.parse(text)


def ready_registry(folder: Path) -> preload.Registry:
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    registry = preload.Registry()
    ready = preload._Ready("the model", preload.fingerprint(str(folder)))
    registry._models[str(folder), 4] = ready
    registry._tokenizers[str(folder)] = preload._Ready("the tokenizer", ready.files)
    return registry


def test_a_model_is_given_away_once(tmp_path):
    registry = ready_registry(tmp_path / "model")
    assert registry.take(str(tmp_path / "model"), 4) == "the model"
    assert registry.take(str(tmp_path / "model"), 4) is None
    assert registry.take_tokenizer(str(tmp_path / "model")) == "the tokenizer"


def test_another_quantisation_is_another_model(tmp_path):
    registry = ready_registry(tmp_path / "model")
    assert registry.take(str(tmp_path / "model"), 0) is None


def test_a_model_whose_files_changed_is_not_given_away(tmp_path):
    registry = ready_registry(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("other weights")
    assert registry.take(str(tmp_path / "model"), 4) is None
    assert registry.take_tokenizer(str(tmp_path / "model")) is None
