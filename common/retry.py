"""The one retry policy: waits that double up to a longest, with jitter, until giving up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait before each further attempt, and for how long to try.

    Args:
        first_s: seconds before the second attempt.
        longest_s: seconds that no wait exceeds.
        jitter: share of each wait that is drawn at random, so that twenty nodes do not retry in
            step: 0.5 waits between half of the wait and all of it.
        give_up_s: seconds after the first attempt from which on there is no further one.
    """

    first_s: float
    longest_s: float
    jitter: float = 0.0
    give_up_s: float = float("inf")

    def waits(
        self,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> Iterator[float]:
        """Seconds to wait before each further attempt; they end when it is time to give up.

        Call it before the first attempt: the time until giving up runs from this call.

        Args:
            clock: seconds, never going back.
            draw: a number between two.
        """
        return self._waits(clock, clock() + self.give_up_s, draw)

    def _waits(
        self, clock: Callable[[], float], end: float, draw: Callable[[float, float], float]
    ) -> Iterator[float]:
        wait = min(self.first_s, self.longest_s)
        while clock() < end:
            yield draw((1 - self.jitter) * wait, wait) if self.jitter else wait
            wait = min(2 * wait, self.longest_s)
