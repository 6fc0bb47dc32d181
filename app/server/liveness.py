"""Who of those at work still lives: slow is not dead as long as its SuperNode gives signs of life.

A SuperNode of medfed's sends its heartbeat every 3 s while it works on a message
(``supernode/lifeline.py``). The SuperLink itself waits for 20 s to 60 s of silence before it calls
a SuperNode offline, which a round need not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from app.server.institutions import Institutions, Presence

LOOK_S = 1.5

# A whole project that is started again is back one by one, and its SuperLink remembers who was
# online before: whom an earlier ServerApp had asked is given so long until its first sign of life,
# so that the same institutions go on with the round.
RETURN_S = 60.0


@dataclass
class _Watched:
    online_until: float | None
    alive: bool = True
    silent_s: float = 0.0


class Liveness:
    """Watches institutions that were asked.

    Args:
        institutions: where signs of life come from; a simulation has none, so there nobody is
            ever silent.
        silence_s: seconds without a sign after which an institution counts as lost; one that was
            never asked by way of ``watch`` has at least ``RETURN_S`` for its first.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        institutions: Institutions,
        silence_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._institutions = institutions
        self._silence_s = silence_s
        self._clock = clock
        self._looked = clock()
        self._watched: dict[str, _Watched] = {}

    def watch(self, name: str, presence: Presence) -> None:
        """Begin anew to listen for a sign of an institution, which is asked now."""
        self._watched[name] = _Watched(presence.online_until)

    def lost(self, names: Iterable[str], connected: dict[str, str]) -> dict[str, str]:
        """Who of ``names`` is lost, and why; looks at most every ``LOOK_S``.

        Args:
            names: who is at work.
            connected: institution → when it had last connected as it was asked. One that has
                connected anew since has forgotten what it was asked.
        """
        now = self._clock()
        elapsed = now - self._looked
        if not self._institutions.registered or elapsed < LOOK_S:
            return {}
        self._looked = now
        online = self._institutions.online()
        found = {}
        for name in names:
            watched = self._watched.setdefault(name, _Watched(None, alive=False))
            presence = online.get(name)
            patience_s = self._silence_s if watched.alive else max(RETURN_S, self._silence_s)
            # If it was us who did not look (a machine that slept), nobody is to blame.
            silent_s = watched.silent_s + min(elapsed, 2 * LOOK_S)
            if presence is None:
                watched.silent_s = silent_s
                if watched.alive or silent_s >= patience_s:
                    found[name] = "its SuperNode is offline"
            elif connected.get(name, presence.activated) != presence.activated:
                found[name] = RESTARTED
            elif watched.online_until not in (None, presence.online_until):
                self.watch(name, presence)
            else:
                watched.online_until, watched.silent_s = presence.online_until, silent_s
                if silent_s >= patience_s:
                    found[name] = f"no sign of life for {silent_s:.0f} s"
        return found


RESTARTED = "its SuperNode has connected anew, and forgotten what it was asked"
