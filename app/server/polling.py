"""Waiting for replies: quick while they may come any moment, slow when they take long.

Stock Flower's ``Grid.send_and_receive`` looks every 3 s. This does the same work with the public
methods ``push_messages`` and ``pull_messages``, so no Flower internal is touched, and the same code
runs in the simulation. Where the SuperLink holds the question open until there is a reply
(``superlink/longpoll.py``), the next question follows at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from flwr.app import Message

FIRST_WAIT_S = 0.02
LONGEST_WAIT_S = 0.5
HELD_S = 0.4  # an answer that took this long came from a SuperLink that holds questions open


class Grid(Protocol):
    """The two methods of ``flwr.serverapp.Grid`` that are needed here."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their ids in the same order, empty for one that was refused."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that are there."""


def waits(first: float = FIRST_WAIT_S, longest: float = LONGEST_WAIT_S) -> Iterator[float]:
    """Seconds to wait before each further look: doubling from ``first``, never over ``longest``."""
    wait = first
    while True:
        yield wait
        wait = min(wait * 2, longest)


class Mailbox:
    """Messages that are out, and the replies that come in.

    Args:
        grid: Flower's grid, or anything with its two methods.
        clock: monotonic seconds.
        sleep: what sleeps.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._clock, self._sleep = grid, clock, sleep
        self._pauses = waits()
        self.awaited: set[str] = set()

    def send(self, messages: Iterable[Message]) -> list[str]:
        """Send messages; their ids in the same order, empty for one that was refused."""
        pushed = [message_id or "" for message_id in self._grid.push_messages(list(messages))]
        self.awaited |= set(pushed) - {""}
        self._pauses = waits()
        return pushed

    def look(self, most_s: float = LONGEST_WAIT_S) -> list[Message]:
        """What has arrived, errors included; waits a moment, ``most_s`` at most, if nothing has."""
        asked = self._clock()
        arrived = list(self._grid.pull_messages(sorted(self.awaited)))
        self.awaited -= {reply.metadata.reply_to_message_id for reply in arrived}
        if arrived:
            self._pauses = waits()
        elif self._clock() - asked < HELD_S:
            self._sleep(min(next(self._pauses), most_s))
        return arrived


def replies(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Message]:
    """Send messages and yield each reply as it arrives, errors included.

    Args:
        grid: Flower's grid, or anything with its two methods.
        messages: what to send, one message per node.
        timeout: seconds after which no more replies are waited for.
        clock: monotonic seconds.
        sleep: what sleeps.

    Yields:
        Replies in the order of their arrival; fewer than messages when the time ran out or a
        message was refused.
    """
    end = clock() + timeout
    mailbox = Mailbox(grid, clock=clock, sleep=sleep)
    mailbox.send(messages)
    while mailbox.awaited and (left := end - clock()) > 0:
        yield from mailbox.look(left)
