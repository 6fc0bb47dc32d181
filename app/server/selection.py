"""Client sampling: which institutions a round asks, in which order, and whom in place of others.

Everything here follows from the round's seeded order, who is online, and the plan of who has been
asked so far; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from app.server.ledger import Plan

MOST_ASKED = 2  # times that one institution is asked in one round


class Selection:
    """Chooses the institutions of one round.

    Args:
        plan: who has been asked; whoever sends the messages writes it.
        order: tells everyone who may be asked, in the round's seeded order.
        size: institutions that a round is meant to have.
        replacements: how many may be asked in place of others.
    """

    def __init__(
        self, plan: Plan, order: Callable[[], Sequence[str]], size: int, replacements: int
    ) -> None:
        self.plan = plan
        self.size = size
        self._order = order
        self._replacements = replacements

    def first(self, online: Collection[str], standing: int) -> list[str]:
        """The first in the order, as many as are missing.

        Args:
            online: institutions that are online.
            standing: how many have replied or still may.
        """
        return self._candidates(online)[: self.size - standing]

    def wants_replacement(self, standing: int) -> bool:
        """Whether another institution may be asked in place of one that is lost."""
        return standing < self.size and self.plan.replacements < self._replacements

    def replacement(self, online: Collection[str]) -> str | None:
        """The next in the order, who is then counted as a replacement; None: there is nobody."""
        candidates = self._candidates(online)
        if not candidates:
            return None
        self.plan.replacements += 1
        return candidates[0]

    def may_ask_again(self, name: str, online: Collection[str]) -> bool:
        """Whether an institution has another chance in this round."""
        return name in online and len(self.plan.asked[name]) < MOST_ASKED

    def begin_again(self, accepted: Collection[str]) -> None:
        """Keep those whose reply was accepted; everyone else may be asked anew."""
        self.plan.asked = {name: self.plan.asked[name] for name in accepted}
        self.plan.failed.clear()
        self.plan.replacements = 0

    def _candidates(self, online: Collection[str]) -> list[str]:
        return [name for name in self._order() if name in online and name not in self.plan.asked]
