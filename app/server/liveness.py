"""Which institutions at work are still alive: one that is slow but sends heartbeats is not dead.

medfed's SuperNode sends a heartbeat every 3 s while it works on a message. The SuperLink calls a
SuperNode offline only after 20 s to 60 s without one; a round replaces it sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from app.server.institutions import Institutions, Presence

LOOK_S = 1.5

# After a restart of the whole project, institutions come back one by one, while the SuperLink still
# lists them as online. An institution that an earlier ServerApp had asked has this long to send its
# first heartbeat, so that the same institutions go on with the round.
RETURN_S = 60.0


@dataclass
class _Watched:
    online_until: float | None
    alive: bool = True
    silent_s: float = 0.0


class Liveness:
    """Watches the heartbeats of institutions that were asked.

    Args:
        institutions: tells when each heartbeat expires; a simulation has no heartbeats, so there
            nobody is ever lost.
        timeout_s: seconds without a heartbeat after which an institution counts as lost; one that
            ``watch`` was never called for has at least ``RETURN_S`` for its first.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        institutions: Institutions,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._institutions = institutions
        self._timeout_s = timeout_s
        self._clock = clock
        self._looked = clock()
        self._watched: dict[str, _Watched] = {}

    def watch(self, name: str, presence: Presence) -> None:
        """Start the timeout of an institution that is asked now."""
        self._watched[name] = _Watched(presence.online_until)

    def lost(self, names: Iterable[str], connected: dict[str, str]) -> dict[str, str]:
        """Which of ``names`` are lost, and why; asks the SuperLink at most every ``LOOK_S``.

        Args:
            names: the institutions at work.
            connected: institution → when its SuperNode had last connected when asked. One that
                has reconnected since has forgotten its message.
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
            most_s = self._timeout_s if watched.alive else max(RETURN_S, self._timeout_s)
            # Time in which this process did not look (a suspended machine) counts for nobody.
            silent_s = watched.silent_s + min(elapsed, 2 * LOOK_S)
            if presence is None:
                watched.silent_s = silent_s
                if watched.alive or silent_s >= most_s:
                    found[name] = "its SuperNode is offline"
            elif connected.get(name, presence.activated) != presence.activated:
                found[name] = RESTARTED
            elif watched.online_until not in (None, presence.online_until):
                self.watch(name, presence)
            else:
                watched.online_until, watched.silent_s = presence.online_until, silent_s
                if silent_s >= most_s:
                    found[name] = f"no heartbeat for {silent_s:.0f} s"
        return found


RESTARTED = "its SuperNode has reconnected and forgotten its message"
