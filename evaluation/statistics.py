"""How sure an accuracy is: intervals and paired tests, exact where exact is cheap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Two-sided 95 % of a normal distribution.
Z95 = 1.959963984540054


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of the proportion ``correct / n``; ``n`` above 0."""
    p = correct / n
    shrink = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / shrink
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / shrink
    # At 0 and n the bound is the proportion itself; only rounding would say otherwise.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True)
class Paired:
    """Two answer sheets to the same questions, compared by an exact McNemar test.

    Attributes:
        gained: questions that only the first has right.
        lost: questions that only the second has right.
        p_value: two-sided: how likely chance alone is to make them differ by so much.
    """

    gained: int
    lost: int
    p_value: float


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> Paired:
    """Compare two answer sheets, one mark a question, in the same order."""
    gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return Paired(gained, lost, min(1.0, 2 * tail / 2**n))


def mean_of_proportions(proportions: Sequence[tuple[int, int]]) -> tuple[float, float, float]:
    """Unweighted mean of several ``(correct, n)`` with its 95 % interval (normal, independent)."""
    rates = [correct / n for correct, n in proportions]
    mean = sum(rates) / len(rates)
    variance = sum(p * (1 - p) / n for p, (_, n) in zip(rates, proportions, strict=True))
    half = Z95 * math.sqrt(variance) / len(rates)
    return mean, max(0.0, mean - half), min(1.0, mean + half)
