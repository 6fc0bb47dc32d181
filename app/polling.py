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


def replies(
    grid: Grid,
    messages: Iterable[Message],
    timeout: float,
    *,
    on_push: Callable[[list[str]], None] = lambda message_ids: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Message]:
    """Send messages and yield each reply as it arrives, errors included.

    Args:
        grid: Flower's grid, or anything with its two methods.
        messages: what to send, one message per node.
        timeout: seconds after which no more replies are waited for.
        on_push: told the messages' ids, in their order, before the first reply.
        clock: monotonic seconds.
        sleep: what sleeps.

    Yields:
        Replies in the order of their arrival; fewer than messages when the time ran out or a
        message was refused.
    """
    end = clock() + timeout
    pushed = list(grid.push_messages(list(messages)))
    on_push(pushed)
    missing = {message_id for message_id in pushed if message_id}
    pauses = waits()
    while missing:
        asked = clock()
        arrived = list(grid.pull_messages(sorted(missing)))
        missing -= {reply.metadata.reply_to_message_id for reply in arrived}
        yield from arrived
        now = clock()
        if not missing or now >= end:
            return
        if arrived:
            pauses = waits()
        elif now - asked < HELD_S:
            sleep(min(next(pauses), end - now))
