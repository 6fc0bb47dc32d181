"""A run in containers to which something happens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.cli.build import build_fab_from_disk

from common.errors import SuperLinkError
from superlink.control import Control, Run
from tests.e2e.compose_project import ROOT, ComposeProject, until

RUNS = "/medfed/runs"
ROUNDS = 2

# A tiny model on real cards: some seconds of training, in which something can happen.
CONFIG: Mapping[str, bool | int | float | str] = {
    "model.name": "local/tiny",
    "model.quantization": 0,
    "model.gradient-checkpointing": False,
    "static.dataset.name": "local/hpo-flashcards",
    "train.seq-length": 64,
    "train.training-arguments.per-device-train-batch-size": 4,
    "train.training-arguments.max-steps": 200,
    "evaluate.holdout-examples": 0,
    "num-server-rounds": ROUNDS,
}
LONG_S = 240.0

# Runs inside a container: lies in wait for a process, and ends it with SIGKILL.
ASSASSIN = """
import os, signal, sys, time

wanted, seconds, written, fresh = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def read(pid, file):
    try:
        with open(f"/proc/{pid}/{file}", "rb") as content:
            return content.read().decode(errors="replace")
    except OSError:
        return ""

def line_of(pid):
    return read(pid, "cmdline").replace("\\0", " ")

def fits(pid):
    line = line_of(pid)
    if wanted != "ClientApp":
        return pid != "1" and wanted in line and "python3 -c" not in line
    # A cold one has its own name; a warm one is a fork of the warm process, and looks like it;
    # before either is there, its launcher is.
    parent = read(pid, "stat").rpartition(")")[2].split()[1:2]
    forked = "supernode.warm" in line and parent and "supernode.warm" in line_of(parent[0])
    named = read(pid, "comm").strip() == "flwr-clientapp"
    return named or forked or (not seconds and "launcher.py" in line)

def found():
    return {pid for pid in os.listdir("/proc") if pid.isdecimal() and fits(pid)}

def cpu_seconds(pid):
    fields = read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0

def bytes_written(pid):
    counters = read(pid, "io")
    return int(counters.split("wchar: ")[1].split()[0]) if counters else 0

known = found() if fresh == "fresh" else set()
end = time.monotonic() + 120
print("waiting", flush=True)
while time.monotonic() < end:
    for pid in found() - known:
        while fits(pid) and cpu_seconds(pid) < seconds:
            time.sleep(0.002)
        before = bytes_written(pid)
        while written and fits(pid) and bytes_written(pid) - before < written:
            pass
        time.sleep(0.01 if written else 0)  # from what it logged last into what it does then
        if not fits(pid):  # it has become somebody else, or ended
            continue
        line = line_of(pid)
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
        print(f"killed {pid}: {line}", flush=True)
        sys.exit(0)
    time.sleep(0.002)
sys.exit("nobody came")
"""


class Scenario:
    """Runs of this project's app in one federation.

    Args:
        project: the containers.
        folder: for this machine's copy of the CA's certificate.
    """

    def __init__(self, project: ComposeProject, folder: Path) -> None:
        self.project = project
        self._ca = folder / "ca.crt"
        project.compose("cp", "superlink:/medfed/certs/ca.crt", str(self._ca))
        self._fab = build_fab_from_disk(ROOT)

    def start(
        self,
        config: Mapping[str, bool | int | float | str] | None = None,
        fab: bytes | None = None,
    ) -> int:
        """Start a run; its id."""
        with self._control() as control:
            return control.start_run(fab or self._fab, {**CONFIG, **(config or {})})

    def stop(self, run: int) -> None:
        """Stop a run as an operator does."""
        with self._control() as control:
            control.stop_run(run)

    def state(self, run: int) -> Run | None:
        """What the SuperLink says of a run; None while it says nothing."""
        try:
            with self._control() as control:
                return control.run(run)
        except SuperLinkError:
            return None

    def online(self) -> set[str]:
        """Who is online, as the SuperLink says; nobody while it says nothing."""
        try:
            with self._control() as control:
                return {node.name for node in control.nodes() if node.online}
        except SuperLinkError:
            return set()

    def events(self, run: int, *kinds: str) -> list[dict[str, Any]]:
        """The run's events so far; none while the SuperLink's container is down."""
        status, output = self.project.container("superlink").exec_run(
            ["cat", f"{RUNS}/{run}/events.jsonl"]
        )
        lines = output.decode().splitlines(keepends=True) if status == 0 else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if not kinds or event["event"] in kinds]

    def until_event(
        self, run: int, kind: str, deadline_s: float = LONG_S, **details: object
    ) -> dict[str, Any]:
        """Wait for an event."""
        found: list[dict[str, Any]] = []

        def there() -> bool:
            found[:] = [
                event for event in self.events(run, kind) if details.items() <= event.items()
            ]
            return bool(found)

        until(there, deadline_s, lambda: f"no {kind} {details}: {self.told(run)}")
        return found[0]

    def until_ended(self, run: int, *, failures: int = 0) -> dict[str, Any]:
        """Wait for the run's good end, after so many bad ones before; its summary."""

        def over() -> bool:
            assert len(self.events(run, "failed")) <= failures, self.told(run)
            return bool(self.events(run, "finished"))

        until(over, LONG_S, lambda: f"not finished: {self.told(run)}")
        return self.summary(run)

    def until_failed(self, run: int, deadline_s: float = LONG_S) -> str:
        """Wait for the run's bad end; the reason, as the SuperLink has it."""
        ended: list[Run] = []

        def over() -> bool:
            state = self.state(run)
            ended[:] = [state] if state is not None and state.finished else []
            return bool(ended)

        until(over, deadline_s, lambda: f"not ended: {self.told(run)}")
        return ended[0].details

    def summary(self, run: int) -> dict[str, Any]:
        """The run's ``summary.json``."""
        read = f"print(open('{RUNS}/{run}/summary.json').read())"
        found: dict[str, Any] = json.loads(self.project.python("superlink", read))
        return found

    def told(self, run: int) -> str:
        """The last events, for a message."""
        return json.dumps(self.events(run)[-6:], indent=1)

    def trainers(self, run: int) -> list[tuple[str, ...]]:
        """Who gave a reply, round by round."""
        found: dict[int, set[str]] = {}
        for event in self.events(run, "reply"):
            found.setdefault(event["round"], set()).add(event["institution"])
        return [tuple(sorted(found[number])) for number in sorted(found)]

    def first_asked(self, run: int, number: int = 1) -> str:
        """Wait until a round has begun; the first that it asked."""
        names = self.until_event(run, "round-started", round=number)["institutions"]
        return str(names[0])

    def lie_in_wait(
        self, service: str, wanted: str, *, seconds: float = 0.0, written: int = 0
    ) -> Iterator[bytes]:
        """Kill the next process of its kind that is started in a container.

        Args:
            service: whose container.
            wanted: ``ClientApp``, or part of a command line.
            seconds: of CPU time that it has to use before it dies.
            written: bytes that it has to log after that (sockets do not count).

        Returns:
            What the assassin says, in which the process that died is named.
        """
        return self._assassin(service, wanted, seconds, written, "fresh")

    def kill(self, service: str, wanted: str, *, seconds: float = 0.0) -> str:
        """Kill a process of a container, which may be there already; which it was."""
        before = self._started(service)
        said = b"".join(self._assassin(service, wanted, seconds, 0, "any")).decode()
        if "killed" not in said:  # with a container's first process dies whoever killed it there
            until(lambda: self._started(service) != before, 60.0, lambda: f"still alive: {said}")
        return said

    def _started(self, service: str) -> str:
        return str(self.project.container(service).attrs["State"]["StartedAt"])

    def _assassin(
        self, service: str, wanted: str, seconds: float, written: int, which: str
    ) -> Iterator[bytes]:
        client = self.project.client.api
        command = ["python3", "-c", ASSASSIN, wanted, str(seconds), str(written), which]
        identity = client.exec_create(self.project.container(service).id, command)["Id"]
        output: Iterator[bytes] = client.exec_start(identity, stream=True)
        assert next(output).startswith(b"waiting")
        return output

    def in_training(self, service: str) -> None:
        """Wait until the institution's ClientApp has been at work for a while."""
        watch = ASSASSIN.replace("os.kill(int(pid), signal.SIGKILL)", "os.kill(int(pid), 0)")
        command = ["python3", "-c", watch, "ClientApp", "1.0", "0", "any"]
        status, output = self.project.container(service).exec_run(command)
        assert status == 0, output

    def _control(self) -> Control:
        return Control(f"127.0.0.1:{self.project.port}", self._ca)


def elapsed(begun: float) -> float:
    """Seconds since a monotonic moment."""
    return time.monotonic() - begun
