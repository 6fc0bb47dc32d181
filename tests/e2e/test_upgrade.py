"""Two versions of Flower in one federation, and a SuperLink that goes from one to the other.

One federation lives through all of it, in the order of the tests: first the oldest supported
SuperLink with the newest SuperNodes, then its upgrade in the middle of a run, then the newest
SuperLink with the oldest SuperNodes, at last the rollback. Every run gives the same adapter.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

import certs
from common.errors import SuperLinkError
from medfed.paths import Home
from superlink import health
from superlink.control import Control
from supernode import roster
from tests.e2e.warm_federation import free_port
from tests.small_llama import CONFIG as SMALL
from tests.small_llama import small_home

ROOT = Path(__file__).parents[2]
NAMES = ("supernode-00", "supernode-01")
NEWEST = Path(sys.executable)
# `make setup-oldest` makes it.
OLDEST = Path(os.environ.get("MEDFED_OLDEST_PYTHON", ROOT / ".venv-flower-1.41" / "bin" / "python"))
CONFIG = {**SMALL, "num-server-rounds": 3, "evaluate.holdout-examples": 0}
ONLINE_S, LONG_S = 120.0, 300.0

pytestmark = [
    pytest.mark.processes,
    pytest.mark.weights,
    pytest.mark.skipif(
        not OLDEST.exists(),
        reason=f"needs the oldest supported Flower in {OLDEST}: make setup-oldest",
    ),
]


def flower_of(python: Path) -> str:
    asked = "from importlib.metadata import version; print(version('flwr'))"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def until(what: Callable[[], Any], seconds: float, told: Callable[[], str]) -> Any:
    """What ``what`` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, told()
        time.sleep(0.2)
    return found


class MixedFederation:
    """A SuperLink and two SuperNodes, each started by the product's own entry point.

    Args:
        home: with a small model, cards and partitions.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self.port = free_port()
        self.database = home.superlink / "state.db"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        certs.issue(home.certs, NAMES)
        home.superlink.mkdir(parents=True)
        self._fab = build_fab_from_disk(ROOT)

    def control(self) -> Control:
        return Control(f"127.0.0.1:{self.port}", self.home.certs / "ca.crt")

    def start_superlink(self, python: Path) -> None:
        pki = self.home.certs
        arguments = [
            *("--certificate", pki / "superlink.crt", "--key", pki / "superlink.key"),
            *("--ca", pki / "ca.crt", "--database", self.database, "--port", self.port),
        ]
        variables = {"MEDFED_INSTITUTIONS": ",".join(NAMES)}
        self._start("superlink", python, arguments, variables)

        def answers() -> bool:
            assert self._running["superlink"].poll() is None, self.log("superlink")
            return health.problem("127.0.0.1", self.port, pki / "ca.crt") is None

        until(answers, ONLINE_S, lambda: self.log("superlink"))

    def start_supernodes(self, python: Path) -> None:
        pki = self.home.certs
        with self.control() as control:
            control.register({name: pki / "supernodes" / f"{name}.pub" for name in NAMES})
        for name in NAMES:
            arguments = [
                *("--name", name, "--superlink", f"127.0.0.1:{self.port}", "--ca", pki / "ca.crt"),
                *("--key", pki / "supernodes" / f"{name}.key"),
                *("--data", self.home.partitions / name, "--runtime-port", free_port()),
                *("--roster", roster.DEFAULT_ROSTER),
            ]
            self._start(name, python, arguments, {})
        self.until_online()

    def until_online(self) -> None:
        with self.control() as control:
            control.wait_online(list(NAMES), ONLINE_S)

    def _start(
        self, name: str, python: Path, arguments: list[Any], variables: dict[str, str]
    ) -> None:
        room = "superlink" if name == "superlink" else "supernode"
        with self._log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [str(python), "-m", room, *map(str, arguments)],
                cwd=ROOT,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("MEDFED_WARM")},
                    "MEDFED_HOME": str(self.home.root),
                    "FLWR_HOME": str(self.home.root / "flwr" / name),
                    "PYTHONPATH": str(ROOT),
                    "PYTHONUNBUFFERED": "1",
                    **variables,
                },
                stdout=log,
                stderr=log,
            )

    def stop(self, *names: str) -> None:
        for name in names:
            self._running[name].send_signal(signal.SIGTERM)
        for name in names:
            process = self._running.pop(name)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def stop_all(self) -> None:
        self.stop(*sorted(self._running, reverse=True))

    def end_of(self, name: str) -> int:
        return self._running.pop(name).wait(60)

    def _log(self, name: str) -> Path:
        return self.home.root / f"{name}.log"

    def log(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")

    def messages_received(self) -> int:
        """Messages whose every part has arrived at its SuperNode, of all runs together."""
        return sum(self.log(name).count("Received successfully") for name in NAMES)

    def start_run(self) -> int:
        with self.control() as control:
            return control.start_run(self._fab, CONFIG)

    def events(self, run: int, kind: str) -> list[dict[str, Any]]:
        file = self.home.runs / str(run) / "events.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == kind]

    def adapter_of(self, run: int) -> str:
        """Wait for a run's good end; its adapter's SHA-256."""

        def ended() -> bool:
            assert self.events(run, "failed") == [], self.log("superlink")
            return bool(self.events(run, "finished"))

        until(ended, LONG_S, lambda: f"run {run} has not finished: {self.log('superlink')}")
        summary = json.loads((self.home.runs / str(run) / "summary.json").read_text())

        def over() -> bool:
            try:
                with self.control() as control:
                    return control.run(run).finished
            except SuperLinkError:
                return False

        until(over, ONLINE_S, lambda: self.log("superlink"))
        return str(summary["adapter_sha256"])


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MixedFederation]:
    federation = MixedFederation(small_home(tmp_path_factory.mktemp("upgrade")))
    try:
        yield federation
    finally:
        federation.stop_all()


@pytest.fixture(scope="module")
def adapters() -> dict[str, str]:
    """What each run gave, by what it was run on."""
    return {}


def test_the_two_versions_are_not_the_same():
    assert flower_of(OLDEST) != flower_of(NEWEST)


def test_the_oldest_superlink_works_with_the_newest_supernodes(federation, adapters):
    federation.start_superlink(OLDEST)
    federation.start_supernodes(NEWEST)
    adapters["oldest SuperLink"] = federation.adapter_of(federation.start_run())


def test_a_superlink_that_is_upgraded_in_the_middle_of_a_run_goes_on_to_the_same_adapter(
    federation, adapters
):
    received = federation.messages_received()
    run = federation.start_run()
    # Both institutions are at work on the second round.
    until(lambda: federation.messages_received() == received + 4, LONG_S, lambda: "no second round")
    federation.stop("superlink")
    assert len(federation.events(run, "round-finished")) < 3, "stopped too late to prove anything"
    federation.start_superlink(NEWEST)
    federation.until_online()
    assert federation.adapter_of(run) == adapters["oldest SuperLink"]
    assert federation.events(run, "resumed")


def test_the_database_was_backed_up_before_it_was_migrated(federation):
    (copy,) = federation.database.parent.glob("state.db.before-*")
    assert f"a copy of it as it was: {copy}" in federation.log("superlink")


def test_the_newest_superlink_works_with_the_oldest_supernodes(federation, adapters):
    federation.stop(*NAMES)
    federation.start_supernodes(OLDEST)
    assert federation.adapter_of(federation.start_run()) == adapters["oldest SuperLink"]


def test_the_oldest_superlink_refuses_the_migrated_database_and_says_the_way_back(federation):
    federation.stop("superlink")
    with pytest.raises(AssertionError):
        federation.start_superlink(OLDEST)
    assert federation.end_of("superlink") == 1
    said = federation.log("superlink")
    assert re.search(r"error: expected a database that this Flower knows .* of a newer one", said)
    assert "hint: start the newer Flower again, or roll back: mv " in said


def test_after_the_rollback_the_oldest_superlink_goes_on_as_before(federation, adapters):
    (copy,) = federation.database.parent.glob("state.db.before-*")
    copy.replace(federation.database)
    for suffix in ("-wal", "-shm"):
        Path(f"{federation.database}{suffix}").unlink(missing_ok=True)
    federation.start_superlink(OLDEST)
    federation.until_online()
    assert federation.adapter_of(federation.start_run()) == adapters["oldest SuperLink"]
