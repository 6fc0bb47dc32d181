"""Hook: a SuperNode that works on a message sends a heartbeat every 3 s, whatever happens.

Flower sends one every 20 s and announces 30 s, so the SuperLink takes a dead SuperNode for online
for up to a minute; and Flower's thread ends for good on the first HTTP 500. Here a SuperNode at
work announces 10 s, Flower's least: whoever waits for its reply sees ``online_until`` move, and
20 s after it stopped it counts as offline. At rest everything is as in Flower.

Replaced: the class ``HeartbeatSender`` as ``http_request_response`` uses it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from importlib import import_module
from logging import INFO, WARNING
from typing import Any

import httpx

from .digests import replace
from .hooks import Hook

HOOK = Hook(
    name="heartbeats",
    gives="a heartbeat every 3 s while a SuperNode works on a message, whatever happens",
    without="a dead SuperNode counts as online for up to a minute, and one HTTP 500 ends its "
    "heartbeats for good",
    pins={
        "flwr.supernode.fleet_http_connection": {"http_request_response": "b80ca36779c2657f"},
        "flwr.supercore.heartbeat": {"HeartbeatSender": "27714c8e35121c84"},
    },
    requires=("supernode_polling",),  # which knows when a message arrives and when it is answered
)
_CONNECTION = "flwr.supernode.fleet_http_connection"
WORKING_EVERY_S = 3.0
WORKING_ANNOUNCED_S = 10  # flwr.common.constant.HEARTBEAT_MIN_INTERVAL
_AT_REST_EVERY_S = (17.5, 22.5)  # as flwr.supercore.heartbeat draws it
_AFTER_FAILURE_S = (2.0, 4.0)


class Heartbeats:
    """Sends heartbeats in a thread. Takes the place of Flower's ``HeartbeatSender``.

    Args:
        announce: called with the seconds that the next heartbeat is to announce.
        at_rest: seconds to announce at rest.
        draw: a number between two, so that twenty nodes do not send in step.
    """

    def __init__(
        self,
        announce: Callable[[int], None],
        at_rest: int,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._announce, self._at_rest, self._draw = announce, at_rest, draw
        self._heartbeat: Callable[[], bool] = lambda: False
        self._works = False
        self._trouble = ""
        self._news = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def with_heartbeat(self, heartbeat: Callable[[], bool]) -> Heartbeats:
        """Send with ``heartbeat``; whether the SuperLink took it. Called as the class it replaces.

        Raises:
            RuntimeError: it runs already.
        """
        if self._thread.ident is not None:
            raise RuntimeError("expected one connection in one process, found a second one")
        self._heartbeat = heartbeat
        return self

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Send no more."""
        self._stopped.set()
        self._news.set()
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether heartbeats are sent."""
        return self._thread.is_alive() and not self._stopped.is_set()

    def working(self) -> None:
        """A message has arrived: say so at once, and often until it is answered."""
        if not self._works:
            self._works = True
            self._news.set()

    def resting(self) -> None:
        """The message is answered. The next heartbeat, within 3 s, announces the long interval."""
        self._works = False

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._news.wait(self.beat())
            self._news.clear()

    def beat(self) -> float:
        """Send one heartbeat; the seconds until the next. Nothing that goes wrong gets out."""
        works = self._works
        self._announce(WORKING_ANNOUNCED_S if works else self._at_rest)
        try:
            trouble = "" if self._heartbeat() else "the SuperLink cannot be reached"
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                # Not registered, or no longer: Flower has sent this process the signal to stop.
                self._stopped.set()
                return 0.0
            trouble = f"HTTP status {error.response.status_code}"
        except Exception as error:  # noqa: BLE001  (a thread that ends takes the node offline)
            trouble = str(error) or repr(error)
        self._tell(trouble)
        if trouble:
            return self._draw(*_AFTER_FAILURE_S)
        return WORKING_EVERY_S if works else self._draw(*_AT_REST_EVERY_S)

    def _tell(self, trouble: str) -> None:
        from flwr.common import log

        if trouble and trouble != self._trouble:
            log(WARNING, "No heartbeat got through (%s); trying again every few seconds", trouble)
        elif self._trouble and not trouble:
            log(INFO, "Heartbeats get through again")
        self._trouble = trouble


def install() -> Heartbeats:
    """Have the connection that this process is about to open send its heartbeats from here."""
    connection: Any = import_module(_CONNECTION)

    def announce(seconds: int) -> None:
        # Read for every heartbeat, and by no other thread once the node is activated.
        connection.HEARTBEAT_DEFAULT_INTERVAL = seconds

    heartbeats = Heartbeats(announce, connection.HEARTBEAT_DEFAULT_INTERVAL)
    replace(_CONNECTION, "HeartbeatSender", heartbeats.with_heartbeat)
    return heartbeats
