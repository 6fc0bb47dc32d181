"""Polling for replies: at short intervals at first, at longer ones while nothing comes.

Stock Flower's ``Grid.send_and_receive`` polls every 3 s. This uses the same public methods
(``push_messages``, ``pull_messages``), so it works in the simulation too. Where the SuperLink
answers by long polling, the next poll follows at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from flwr.app import Message

FIRST_WAIT_S = 0.02
LONGEST_WAIT_S = 0.5
HELD_S = 0.4  # an answer that took this long came from a SuperLink that does long polling


class Grid(Protocol):
    """The two methods of ``flwr.serverapp.Grid`` that are needed here."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their ids in the same order, empty for one that was refused."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that are there."""


def waits(first: float = FIRST_WAIT_S, longest: float = LONGEST_WAIT_S) -> Iterator[float]:
    """Seconds to wait before each further poll: doubling from ``first``, never over ``longest``."""
    wait = first
    while True:
        yield wait
        wait = min(wait * 2, longest)


class Mailbox:
    """Sends messages and collects their replies.

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
        """Replies that have arrived, errors included; if none has, wait, at most ``most_s``."""
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
