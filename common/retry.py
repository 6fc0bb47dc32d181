"""The one retry policy: waits that double up to a limit, drawn at random, for so long."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait before each further attempt.

    Args:
        first_s: seconds before the second attempt.
        longest_s: seconds that no wait exceeds.
        jitter: share of each wait that is drawn at random, so that twenty nodes do not retry in
            step: 0.5 waits between half of the wait and all of it.
        give_up_s: seconds after which there are no more attempts.
    """

    first_s: float = 1.0
    longest_s: float = 60.0
    jitter: float = 0.0
    give_up_s: float = float("inf")

    def waits(self, draw: Callable[[float, float], float] = random.uniform) -> Iterator[float]:
        """Seconds to wait before each further attempt, without end.

        Args:
            draw: a number between two.
        """
        for retry in itertools.count():
            wait = self.wait(retry)
            yield draw((1 - self.jitter) * wait, wait) if self.jitter else wait

    def wait(self, retry: int) -> float:
        """Seconds to wait before one attempt, without jitter; 0 is the first retry."""
        # 2.0 ** 1024 is no float: what has doubled 64 times is at its longest.
        return min(self.first_s * 2.0 ** min(retry, 64), self.longest_s)
