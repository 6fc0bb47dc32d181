"""Hook: a SuperNode's signature that has been seen before is refused.

A SuperNode signs the time, to the microsecond, afresh for every request, and Flower accepts
that signature for five minutes: whoever gets hold of one may act for the node that long. Here each
is good once. What is remembered is key and time, not the signature's own bytes: for an elliptic
curve anybody can turn one good signature into a second one.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from importlib import import_module
from typing import Any

from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

from .digests import replace
from .hooks import Hook

_EXTENSIONS = "flwr.superlink.extensions"

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Event, Receive, Send], Awaitable[None]]
Identity = tuple[bytes, bytes]

# From a clock that is ahead until Flower itself calls the time stale, and a second more.
WINDOW_S = TIMESTAMP_TOLERANCE + 2 * SYSTEM_TIME_TOLERANCE + 1.0
_FLEET = "/v1/fleet/"
_REFUSAL = b'{"detail":"Replayed SuperNode authentication"}'


class ReplayGuard:
    """ASGI middleware: 401 for a Fleet request whose key and time have been accepted before.

    Args:
        app: the application; it checks the signatures.
        clock: seconds, never going back.
    """

    def __init__(self, app: Application, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._seen: OrderedDict[Identity, float] = OrderedDict()

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Serve one request."""
        identity = _identity(scope)
        if identity is None:  # not for the Fleet API, or not signed: the application says no
            await self._app(scope, receive, send)
            return
        now = self._clock()
        while self._seen and next(iter(self._seen.values())) < now - WINDOW_S:
            self._seen.popitem(last=False)
        if identity in self._seen:
            await _refuse(send)
            return
        # Before the application is asked, so that two copies at once are not both new to it.
        self._seen[identity] = now

        async def watch(event: Event) -> None:
            if event["type"] == "http.response.start" and event["status"] == 401:
                # Not a good signature: nobody without the key can fill this memory.
                self._seen.pop(identity, None)
            await send(event)

        await self._app(scope, receive, watch)


def _extension_points() -> list[str]:
    from flwr.superlink import extensions, main

    if getattr(main, "extensions", None) is extensions:
        return []
    return ["expected flwr.superlink.main to take middleware from flwr.superlink.extensions"]


HOOK = Hook(
    name="replay_guard",
    gives="a SuperNode's signature is accepted once",
    without="the SuperLink does not start: whoever has a signature could use it for five minutes",
    pins={_EXTENSIONS: {"get_middleware": "37012f4eb789b63f"}},
    check=_extension_points,
)


def install() -> None:
    """Put the guard in front of the SuperLink that this process is about to start."""
    from starlette.middleware import Middleware

    others = import_module(_EXTENSIONS).get_middleware
    replace(_EXTENSIONS, "get_middleware", lambda: (Middleware(ReplayGuard), *others()))


def _identity(scope: Event) -> Identity | None:
    if scope["type"] != "http" or not scope["path"].startswith(_FLEET):
        return None
    # The first of each name, as the application reads them.
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, value)
    try:
        # Decoded: the same bytes can be written in base64 in more than one way.
        key = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
        return key, headers[TIMESTAMP_HEADER.encode()]
    except (KeyError, binascii.Error):
        return None


async def _refuse(send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": _REFUSAL})
