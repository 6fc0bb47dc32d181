"""What a run costs in bytes, counted as the leaderboard's template counts it."""

from __future__ import annotations

from collections.abc import Iterable
from logging import WARNING
from pathlib import Path

from flwr.app import Message
from flwr.common import log

from app import durable

MB = 1024**2  # the template divides by this and writes "MB"
BUDGET_MB = 200_000


def array_bytes(messages: Iterable[Message]) -> int:
    """Bytes of all arrays in ``messages``, NumPy's headers included, their names not."""
    return sum(
        len(array.data)
        for message in messages
        if message.has_content()
        for record in message.content.array_records.values()
        for array in record.values()
    )


class Communication:
    """Bytes of the adapters so far, and ``comm_cost.txt`` in the template's own words.

    The template adds a line for what went out and one for what came back, each of them "this
    round" (flowertune-llm ``strategy.py``, ``CommunicationTracker``).

    Args:
        file: ``comm_cost.txt``, appended to.
        total: bytes of the rounds before, where a run goes on.
        lines: lines about them; what else the file says is of a round that is done again.
    """

    def __init__(self, file: Path, total: int = 0, lines: int = 0) -> None:
        self._file = file
        self.total = total
        self.lines = lines
        if file.is_file():
            kept = file.read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
            durable.write(file, "".join(kept).encode())

    def add(self, count: int) -> None:
        """Count ``count`` bytes that went one way."""
        within = self.total <= BUDGET_MB * MB
        self.total += count
        self.lines += 1
        with durable.disk(self._file), self._file.open("a", encoding="utf-8") as lines:
            lines.write(line(self.total, count))
        if within and self.total > BUDGET_MB * MB:
            log(
                WARNING,
                "Communication: expected at most %s MB, found %.2f: the leaderboard will not take "
                "this run. Fewer rounds, or a smaller adapter",
                f"{BUDGET_MB:,}",
                self.total / MB,
            )


def line(total: int, added: int) -> str:
    """One line of ``comm_cost.txt``."""
    return (
        f"Communication budget: used {total / MB:.2f} MB (+{added / MB:.2f} MB this round) "
        f"/ {BUDGET_MB:,} MB\n"
    )
