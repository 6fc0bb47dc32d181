"""supernode/heartbeats.py: signs of life, often while a message is worked on."""

from __future__ import annotations

import queue
import sys
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compat import heartbeats
from compat.heartbeats import Heartbeats


def answer(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://superlink/v1/fleet/send-node-heartbeat")
    return httpx.HTTPStatusError("said", request=request, response=httpx.Response(status))


class SuperLink:
    """Takes heartbeats, or does what it is told instead."""

    def __init__(self) -> None:
        self.announced: queue.Queue[int] = queue.Queue()
        self.next: int = 0
        self.trouble: list[Any] = []

    def announce(self, seconds: int) -> None:
        self.next = seconds

    def heartbeat(self) -> bool:
        self.announced.put(self.next)
        trouble = self.trouble.pop(0) if self.trouble else True
        if isinstance(trouble, Exception):
            raise trouble
        return bool(trouble)


def life(superlink: SuperLink) -> Heartbeats:
    return Heartbeats(superlink.announce, 30, lambda low, high: high).with_heartbeat(
        superlink.heartbeat
    )


def test_the_shortest_interval_is_still_flowers():
    from flwr.common.constant import HEARTBEAT_MIN_INTERVAL

    assert heartbeats.WORKING_ANNOUNCED_S == HEARTBEAT_MIN_INTERVAL


def test_at_rest_everything_is_as_in_flower():
    superlink = SuperLink()
    assert life(superlink).beat() == 22.5
    assert superlink.announced.get() == 30


def test_at_work_it_says_so_often_and_announces_the_shortest_interval():
    superlink = SuperLink()
    node = life(superlink)
    node.working()
    assert node.beat() == 3
    assert superlink.announced.get() == 10


def test_after_work_the_next_one_announces_the_long_interval():
    superlink = SuperLink()
    node = life(superlink)
    node.working()
    node.beat()
    node.resting()
    assert node.beat() == 22.5
    assert list(superlink.announced.queue) == [10, 30]


def test_a_message_is_told_of_at_once():
    superlink = SuperLink()
    node = life(superlink)
    node.start()
    assert superlink.announced.get(timeout=10) == 30
    node.working()
    assert superlink.announced.get(timeout=10) == 10, "not after 22.5 s"
    node.stop()
    assert not node.is_running


TROUBLES = [
    answer(500),
    answer(404),
    RuntimeError("The SuperLink does not recognize this SuperNode."),
    httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING]"),
    MemoryError(),
    False,
]


@given(st.lists(st.sampled_from(TROUBLES), min_size=1, max_size=8), st.booleans())
def test_whatever_goes_wrong_it_goes_on_and_tries_again_soon(troubles, works):
    superlink = SuperLink()
    node = life(superlink)
    if works:
        node.working()
    superlink.trouble = list(troubles)
    assert [node.beat() for _ in troubles] == [4.0] * len(troubles)
    assert node.beat() == (3 if works else 22.5)


def test_the_thread_survives_what_ends_flowers():
    superlink = SuperLink()
    superlink.trouble = [answer(500)]
    node = Heartbeats(superlink.announce, 30, lambda low, high: 0.01)
    node.with_heartbeat(superlink.heartbeat).start()
    assert [superlink.announced.get(timeout=10) for _ in range(3)] == [30] * 3
    assert node.is_running
    node.stop()


def test_a_key_that_is_refused_ends_it():
    superlink = SuperLink()
    superlink.trouble = [answer(401)]
    node = life(superlink)
    node.start()
    node._thread.join(10)
    assert not node.is_running
    assert superlink.announced.qsize() == 1


def test_a_second_connection_in_one_process_is_refused():
    superlink = SuperLink()
    node = life(superlink)
    node.start()
    with pytest.raises(RuntimeError, match="found a second one"):
        node.with_heartbeat(superlink.heartbeat)
    node.stop()


def test_flowers_connection_sends_from_here(monkeypatch):
    from flwr.supernode import fleet_http_connection as connection

    for name in ("HeartbeatSender", "HEARTBEAT_DEFAULT_INTERVAL"):
        monkeypatch.setattr(connection, name, getattr(connection, name))
    node = heartbeats.install()
    seen: list[float] = []
    sender: Any = sys.modules[connection.__name__].HeartbeatSender(
        lambda: seen.append(connection.HEARTBEAT_DEFAULT_INTERVAL) is None
    )
    assert sender is node
    node.beat()
    node.working()
    node.beat()
    assert seen == [30, 10]
