"""Will the SuperLink take this key? Asked, with Flower's own signed request, before Flower starts.

Flower's SuperNode starts a server and a child process first, and when it is then refused it prints
several lines, of which none says why. Here the reasons are told apart: the key is not registered,
or a SuperNode with this key still counts as online, as one that was killed does for 60 s. A session
that left its node id behind in FLWR_HOME is signed off first; then there is nothing to wait for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import SuperNodeError

from .command import Settings
from .connection import last_node_id
from .preflight import read_key

_RETRY_S = 3.0
# What the gateway says to a key that is no institution's (superlink/gateway/config.py).
UNKNOWN_KEY = "the gateway knows no institution with this key"


def enrol(
    settings: Settings,
    timeout: float,
    *,
    say: Callable[[str], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Return the node id under which the SuperLink knows this key.

    Args:
        settings: the SuperNode; its SuperLink has been reached before.
        timeout: seconds to go on asking while the key counts as online.
        say: where to tell that it goes on asking (default: standard error).
        sleep: how to wait between two attempts.

    Raises:
        SuperNodeError: the key is not registered, counted as online to the end, or the answer was
            something else.
    """
    from compat.fleet_api import (
        HEARTBEAT_DEFAULT_INTERVAL,
        ActivateNodeRequest,
        DeactivateNodeRequest,
        FleetHttpClient,
        NodeAuthHttpInterceptor,
        RuntimeVersionHttpInterceptor,
        public_key_to_bytes,
    )

    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    key: ec.EllipticCurvePrivateKey = read_key(settings.key)
    public_key = public_key_to_bytes(key.public_key())
    activate = ActivateNodeRequest(
        public_key=public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
    )
    # No heartbeat is not an interval: refused for the key if that is unknown, else for this.
    question = ActivateNodeRequest(public_key=public_key, heartbeat_interval=0)
    deadline = time.monotonic() + timeout
    said = ""
    with FleetHttpClient.from_server_address(
        settings.superlink,
        insecure=False,
        root_certificates=settings.ca.read_bytes(),
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        ],
    ) as client:
        previous = last_node_id()
        while True:
            try:
                if previous is not None:
                    # If it was offline already, or in another database: the activation will tell.
                    with suppress(httpx.HTTPStatusError):
                        client.DeactivateNode(DeactivateNodeRequest(node_id=previous))
                    previous = None
                if not _is_registered(lambda: client.ActivateNode(question)):
                    raise _not_registered(settings)
                node_id = previous = int(client.ActivateNode(activate).node_id)
                # Only asked: Flower's own request, next, is refused if the node is online already.
                client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))
                return node_id
            except httpx.HTTPStatusError as error:
                trouble = _refusal(settings, error)
                if trouble is None:
                    reason = f"it answers {error.response.status_code}"
                elif not _is_online_already(error) or time.monotonic() >= deadline:
                    raise trouble from None
                else:
                    reason = (
                        "waiting for the session before this one to count as offline at "
                        f"{settings.superlink}, 20 s after it died at work and 60 s at rest"
                    )
            except httpx.TransportError as error:
                reason = f"unreachable: {error}"
            if reason != said:
                say(f"{settings.name}: {reason}; asking again every {_RETRY_S:.0f} s")
                said = reason
            sleep(_RETRY_S)


def _is_registered(question: Callable[[], object]) -> bool:
    """Whether the SuperLink knows the key, asked without becoming online by it.

    Raises:
        httpx.HTTPStatusError: the SuperLink answered neither yes nor no.
    """
    from compat.fleet_api import ApiErrorCode

    try:
        question()
    except httpx.HTTPStatusError as error:
        code = _code(error)
        if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            return False
        if code != ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
            raise
    return True


def _code(error: httpx.HTTPStatusError) -> int | None:
    from compat.fleet_api import FlowerError

    told = FlowerError.from_json(error.response.text)
    return None if told is None else int(told.code)


def _is_online_already(error: httpx.HTTPStatusError) -> bool:
    from compat.fleet_api import ApiErrorCode

    return _code(error) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED


def _refusal(settings: Settings, error: httpx.HTTPStatusError) -> SuperNodeError | None:
    """What the answer means for the hospital's engineer; None: the SuperLink is not up yet."""
    status = error.response.status_code
    name, where = settings.name, settings.superlink
    if _is_online_already(error):
        return SuperNodeError(
            f"expected {name} to be offline at {where}, found that a SuperNode with its key counts "
            "as online",
            "is another one running with this key? One that was killed is forgotten after 60 s",
        )
    if status == httpx.codes.UNAUTHORIZED and error.response.text.strip() == UNKNOWN_KEY:
        return _not_registered(settings)
    if status == httpx.codes.UNAUTHORIZED:
        return SuperNodeError(
            f"expected the SuperLink at {where} to accept the signature of {name}, found it denied",
            "signatures carry the time: is this machine's clock right?",
        )
    if status >= httpx.codes.INTERNAL_SERVER_ERROR:
        return None
    return SuperNodeError(
        f"expected a SuperLink's Fleet API at {where}, found HTTP status {status}",
        "is that the SuperLink's port, and the same Flower version?",
    )


def _not_registered(settings: Settings) -> SuperNodeError:
    name = settings.name
    return SuperNodeError(
        f"expected the key of {name} to be registered at {settings.superlink}, found it is not",
        f"the coordinator registers it: flwr supernode register {name}.pub local-deployment "
        f"--name {name}, and lays {name}.pub where the gateway looks; one that was revoked is "
        "never registered again",
    )
