"""Hook: a SuperNode's connection outlasts restarts of SuperLink, gateway and network.

Flower tries again when a connection is refused or a gateway answers 502 to 504, with waits
that grow to 20 s. Anything else it lets through: a TLS connection that is cut while a gateway
restarts, or one HTTP 500. Then a finished reply is thrown away, or the SuperNode ends. Here

- handing over a reply is tried again for minutes, asking for messages for ever;
- an object of which nobody knows whether it arrived is asked about before it is sent again;
- waits grow to 8 s, and no connection is waited for longer than 5 s.

A run that is over is not argued with (``RunNotRunningException``), nor is a key that is refused
(Flower ends the SuperNode).

Replaced: ``http_request_response``, ``FleetHttpClient`` and ``MAX_RETRY_DELAY``.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as but_with
from importlib import import_module
from logging import ERROR, INFO, WARNING
from typing import Any, ParamSpec, TypeVar

import httpx
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import RunNotRunningException

from common.retry import RetryPolicy

from .digests import replace
from .hooks import Hook

_CONNECTION = "flwr.supernode.fleet_http_connection"
_WORKER = "flwr.supernode.start_client_internal"
_RETRY = "flwr.supercore.retry.http_retry"
HOOK = Hook(
    name="retry",
    gives="requests to the SuperLink that outlast restarts of SuperLink, gateway and network",
    without="a connection that is cut, or one HTTP 500, costs a finished reply or ends the "
    "SuperNode",
    pins={
        _WORKER: {
            "_init_connection": "800f9aba73646ea2",
            "_pull_and_store_message": "eaf5d0e36dc34e4c",
            "_push_messages": "00bb86faffdec114",
        },
        _CONNECTION: {"http_request_response": "b80ca36779c2657f"},
        _RETRY: {"make_simple_http_retry_invoker": "49e12326a4b17e26"},
        "flwr.supercore.protobuf.client": {"ProtobufClient.__init__": "ea57554c6ab40501"},
    },
)
FOR_MINUTES = RetryPolicy(first_s=1.0, longest_s=8.0, jitter=0.5, give_up_s=300.0)
FOR_EVER = but_with(FOR_MINUTES, give_up_s=float("inf"))
_CONNECT_S = 5.0
# Refusals that say "not now"; everything below 500 that is not among them says "no".
_NOT_NOW = (408, 425, 429)

Parameters = ParamSpec("Parameters")
Answer = TypeVar("Answer")


def is_transient(error: Exception) -> bool:
    """Whether what went wrong may be over in a while."""
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        return status >= 500 or status in _NOT_NOW
    return isinstance(error, httpx.HTTPError | OSError)


def always(_error: Exception) -> bool:
    """Try again whatever went wrong, where the other way is the end of the SuperNode."""
    return True


class Retrier:
    """Calls functions again that failed, and says so in the log.

    Args:
        sleep: how to wait.
        clock: seconds, never going back.
        draw: a number between two.
    """

    def __init__(
        self,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._sleep, self._clock, self._draw = sleep, clock, draw

    def retrying(
        self,
        what: str,
        function: Callable[Parameters, Answer],
        policy: RetryPolicy = FOR_MINUTES,
        retriable: Callable[[Exception], bool] = is_transient,
    ) -> Callable[Parameters, Answer]:
        """``function``, called again until it succeeds.

        Args:
            what: it does, for the log.
            function: to call.
            policy: when to call it again; its last exception is let out where that gives up.
            retriable: whether an exception is one after which to try again.
        """

        def retried(*arguments: Parameters.args, **options: Parameters.kwargs) -> Answer:
            from flwr.common import log

            waits, tries = policy.waits(self._clock, self._draw), 0
            while True:
                try:
                    answer = function(*arguments, **options)
                except RunNotRunningException:
                    raise
                except Exception as error:
                    wait = next(waits, None) if retriable(error) else None
                    if wait is None:
                        raise
                    log(WARNING, "Could not %s: %s; again in %.1f s", what, error, wait)
                    self._sleep(wait)
                    tries += 1
                else:
                    if tries:
                        log(INFO, "Could %s after %d more attempts", what, tries)
                    return answer

        return retried


class Delivery:
    """Hands a reply over: the message first, then each of its objects in some thread.

    Args:
        send: Flower's; returns which objects are missing there, and the session to push them in.
        push_object: Flower's; an object that the session does not miss (any more) is an error.
    """

    def __init__(
        self,
        send: Callable[[Any, Any, float], tuple[set[str], str]],
        push_object: Callable[[int, str, str, bytes], None],
    ) -> None:
        self._send, self._push_object = send, push_object
        self._lock = threading.Lock()
        self._reply: tuple[Any, Any, float] | None = None
        self._sessions: dict[str, str] = {}

    def send(self, message: Any, tree: Any, runtime: float) -> tuple[set[str], str]:
        """Hand over the message; the objects that are missing, and the session's id."""
        self._reply, self._sessions = (message, tree, runtime), {}
        return self._send(message, tree, runtime)

    def push_object(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        """Hand over one object, and ask what is missing where that is not clear.

        The SuperLink refuses an object that it has, and one whose session is over. Both happen when
        an answer got lost on its way.

        Raises:
            ObjectPushError: the SuperLink says that it misses the object, and does not take it.
        """
        try:
            self._push_object(run_id, self._sessions.get(session, session), object_id, content)
        except ObjectPushError:
            with self._lock:  # each renewal ends the session before it
                if self._reply is None:
                    raise
                missing, renewed = self._send(*self._reply)
                self._sessions[session] = renewed
                if object_id in missing:
                    self._push_object(run_id, renewed, object_id, content)


def with_retries(connection: tuple[Any, ...], retrier: Retrier) -> tuple[Any, ...]:
    """What Flower's ``http_request_response`` yields, with every request under a retry policy."""
    node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection
    delivery = Delivery(
        retrier.retrying("hand over a reply", send),
        retrier.retrying("hand over a part of a reply", push_object),
    )
    return (
        node_id,
        retrier.retrying("ask for messages", receive, FOR_EVER, always),
        delivery.send,
        _or_drop_the_message(retrier.retrying("ask about a run", get_run)),
        _or_drop_the_message(retrier.retrying("fetch an app", get_fab)),
        retrier.retrying("fetch a part of a message", pull_object),
        delivery.push_object,
        retrier.retrying("confirm a message", confirm),
    )


def _or_drop_the_message(function: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """One message that cannot be worked on is no reason for a SuperNode to end."""

    def dropping(*arguments: Parameters.args, **options: Parameters.kwargs) -> Answer:
        from flwr.common import log

        try:
            return function(*arguments, **options)
        except RunNotRunningException:
            raise
        except Exception as error:
            log(ERROR, "A message is dropped, for what it needs cannot be had: %s", error)
            raise RunNotRunningException from error

    return dropping


def install() -> None:
    """Put the connection that this process is about to open under a retry policy."""
    replace(_RETRY, "MAX_RETRY_DELAY", FOR_MINUTES.longest_s)
    fleet: Any = import_module(_CONNECTION)
    stock: Any = fleet.FleetHttpClient

    class QuickToConnect(stock):  # type: ignore[misc]
        """Flower's client, which would wait 30 s for a connection too."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._client.timeout = httpx.Timeout(self._client.timeout.read, connect=_CONNECT_S)

    replace(_CONNECTION, "FleetHttpClient", QuickToConnect)
    connect = import_module(_WORKER).http_request_response

    @contextmanager
    def connect_with_retries(*arguments: Any, **options: Any) -> Iterator[tuple[Any, ...]]:
        with connect(*arguments, **options) as connection:
            yield with_retries(connection, Retrier())

    replace(_WORKER, "http_request_response", connect_with_retries)
