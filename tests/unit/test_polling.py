"""How long SuperNode and ServerApp wait between two questions, and what of Flower that touches."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.server import polling as server_side
from compat import supernode_polling as polling
from compat.supernode import run_supernode
from tests.fake_clock import Clock


def pace(clock: Clock) -> polling.Pace:
    return polling.Pace(quick=0.25, moment=15, medium=1, while_=300, slow=3, held=1, clock=clock)


# --- the SuperNode's side -------------------------------------------------------------------------


def test_an_unexpected_flower_polls_as_it_does_by_itself(monkeypatch):
    pins = {"flwr.supernode.start_client_internal": {"start_client_internal": "0"}}
    monkeypatch.setattr(polling, "HOOK", replace(polling.HOOK, pins=pins))
    started = _instead_of_flower(monkeypatch)
    run_supernode()
    assert started == [["flower-supernode", "--insecure"]]
    from flwr.supernode import start_client_internal

    assert start_client_internal.time is time


def test_somebody_elses_superexec_is_left_alone(monkeypatch):
    started = _instead_of_flower(monkeypatch, "--isolation=process")
    run_supernode()
    assert started == [["flower-supernode", "--insecure", "--isolation=process"]]


def test_superexec_gets_a_secret_that_is_on_no_disk(monkeypatch):
    started = _instead_of_flower(monkeypatch)
    run_supernode()
    assert started[0][2:5] == ["--isolation", "process", "--superexec-auth-secret-file"]
    secret = Path(started[0][5])
    assert secret.read_bytes() == secret.read_bytes() != b""
    assert len(secret.read_bytes()) == 32
    assert not secret.resolve().exists()  # only this process's descriptor leads to it


def _instead_of_flower(monkeypatch: pytest.MonkeyPatch, *more: str) -> list[list[str]]:
    """Take the place of ``flower_supernode()``; the command lines it was called with."""
    import flwr.supernode.cli as cli

    started: list[list[str]] = []
    for module, name in (
        ("flwr.supernode.start_client_internal", "time"),
        ("flwr.supernode.start_client_internal", "_pull_and_store_message"),
        ("flwr.supernode.start_client_internal", "_push_messages"),
        ("flwr.supernode.start_client_internal", "http_request_response"),
        ("flwr.supernode.fleet_http_connection", "FleetHttpClient"),
        ("flwr.supernode.fleet_http_connection", "HeartbeatSender"),
        ("flwr.supercore.retry.http_retry", "MAX_RETRY_DELAY"),
        ("flwr.supercore.superexec.run_superexec", "time"),
        ("flwr.supercore.superexec.run_superexec", "register_signal_handlers"),
        ("flwr.supernode.cli.flower_supernode", "start_client_internal"),
    ):
        __import__(module)
        monkeypatch.setattr(sys.modules[module], name, getattr(sys.modules[module], name))
    monkeypatch.setattr(cli, "flower_supernode", lambda: started.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["flower-supernode", "--insecure", *more])
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("MEDFED_WARM_PYTHON", sys.executable)
    return started


def test_a_superlink_that_held_the_question_is_asked_again_at_once():
    clock = Clock(100.0)
    waiting = pace(clock)
    waiting.asking()
    clock.now += 20
    assert waiting.wait() == 0


@pytest.mark.parametrize(
    ("since_message", "wait"), [(0, 0.25), (14, 0.25), (16, 1), (299, 1), (301, 3)]
)
def test_a_superlink_that_answers_at_once_is_asked_less_and_less(since_message, wait):
    clock = Clock(100.0)
    waiting = pace(clock)
    waiting.message()
    clock.now += since_message
    waiting.asking()
    assert waiting.wait() == wait


def test_a_node_that_never_had_a_message_polls_as_flower_does():
    assert pace(Clock(100.0)).wait() == 3


@given(st.lists(st.sampled_from(["asking", "message", "pass"]), max_size=30))
def test_no_wait_is_longer_than_stock_flowers(events):
    clock = Clock(100.0)
    waiting = pace(clock)
    for event in events:
        if event == "pass":
            clock.now += 7
        else:
            getattr(waiting, event)()
    assert 0 <= waiting.wait() <= 3


def test_superexec_is_called_when_a_message_has_arrived_and_again_while_its_reply_is_due():
    clock, bell = Clock(100.0), threading.Event()
    node = polling.SuperNodeClock(pace(clock), bell, reply=0.02, ring=0.06, sleep=clock.sleep)
    node.sleep(3)
    assert not bell.is_set()
    rung = []
    for _ in range(7):
        node.sleep(0.5)
        rung.append(bell.is_set())
        bell.clear()
    assert rung == [True, False, False, True, False, False, True]
    assert clock.slept == [3] + [0.02] * 7


def test_superexec_is_called_at_once_for_each_of_two_messages_in_a_row():
    clock, bell = Clock(100.0), threading.Event()
    node = polling.SuperNodeClock(pace(clock), bell, reply=0.02, ring=1, sleep=clock.sleep)
    for _ in range(2):
        node.message_arrived()
        node.sleep(0.5)
        assert bell.is_set()
        bell.clear()
        node.sleep(0.5)
        assert not bell.is_set()


def test_the_next_message_is_waited_for_quickly_after_a_reply():
    clock = Clock(100.0)
    node = polling.SuperNodeClock(pace(clock), threading.Event(), sleep=clock.sleep)
    node.sleep(0.5)
    node.sleep(3)
    assert clock.slept[-1] == 0.25


def test_superexec_wakes_up_at_the_bell_and_sleeps_again():
    bell = threading.Event()
    superexec = polling.SuperExecClock(bell, longest=30)
    threading.Timer(0.05, bell.set).start()
    began = time.monotonic()
    superexec.sleep(1)
    assert time.monotonic() - began < 10
    assert not bell.is_set()


def test_superexec_looks_now_and_then_without_having_been_called():
    superexec = polling.SuperExecClock(threading.Event(), longest=0.01)
    superexec.sleep(1)


# --- the ServerApp's side -------------------------------------------------------------------------


def message(node: int) -> Any:
    return types.SimpleNamespace(metadata=types.SimpleNamespace(dst_node_id=node))


class FakeGrid:
    """Replies arrive at given times; every pull takes ``takes`` seconds."""

    def __init__(self, clock: Clock, arrivals: dict[str, float], takes: float = 0.0) -> None:
        self.clock, self.arrivals, self.takes = clock, arrivals, takes
        self.pulls: list[list[str]] = []

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        ids = [str(m.metadata.dst_node_id) for m in messages]
        return [i if i in self.arrivals else "" for i in ids]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        asked = list(message_ids)
        self.pulls.append(asked)
        self.clock.now += self.takes
        there = [i for i in asked if self.arrivals[i] <= self.clock.now]
        return [
            types.SimpleNamespace(metadata=types.SimpleNamespace(reply_to_message_id=i))
            for i in there
        ]


def ask(grid: FakeGrid, nodes: list[int], timeout: float = 60.0) -> list[str]:
    replies = server_side.replies(
        grid, [message(n) for n in nodes], timeout, clock=grid.clock, sleep=grid.clock.sleep
    )
    return [reply.metadata.reply_to_message_id for reply in replies]


def test_each_reply_is_given_out_when_it_arrives():
    clock = Clock(100.0)
    assert ask(FakeGrid(clock, {"1": 109.0, "2": 102.0}), [1, 2]) == ["2", "1"]
    assert clock.now - 109.0 <= server_side.LONGEST_WAIT_S


def test_only_missing_replies_are_asked_for():
    grid = FakeGrid(Clock(100.0), {"1": 100.0, "2": 101.0})
    ask(grid, [1, 2])
    assert grid.pulls[0] == ["1", "2"]
    assert grid.pulls[-1] == ["2"]


def test_nobody_waits_longer_than_the_timeout():
    clock = Clock(100.0)
    assert ask(FakeGrid(clock, {"1": 1e9}), [1], timeout=10) == []
    assert clock.now == pytest.approx(110)


def test_a_refused_message_is_not_waited_for():
    clock = Clock(100.0)
    assert ask(FakeGrid(clock, {"1": 100.0}), [1, 2]) == ["1"]
    assert clock.slept == []


def test_a_superlink_that_held_the_question_gets_the_next_one_at_once():
    clock = Clock(100.0)
    assert ask(FakeGrid(clock, {"1": 112.0}, takes=5.0), [1]) == ["1"]
    assert clock.slept == []


@given(st.floats(0.001, 1), st.floats(0.001, 10), st.integers(1, 40))
def test_waits_grow_and_stay_under_the_longest(first, longest, count):
    waits = server_side.waits(min(first, longest), longest)
    seen = [next(waits) for _ in range(count)]
    assert seen == sorted(seen)
    assert max(seen) <= longest
