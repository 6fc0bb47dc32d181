"""Hook: long polling. A request for messages is held until there is one.

A SuperNode asks the SuperLink for messages, a ServerApp for replies. Flower answers "nothing yet"
at once, so both choose between late (3 s polls) and expensive (each poll costs a signature, its
check and an SQL transaction). This middleware holds such a request until a message for that node,
or a reply to one of those messages, has arrived *with all its objects*, or some seconds have
passed. Twenty nodes at rest then ask once every 20 s, and a sampled one gets its message within
milliseconds.

It does two more things:

- While a message's objects are still being uploaded, nobody is told of the message. Flower hands it
  out at once, and whoever asks for a missing object waits a full second before asking again.
- Requests reach Flower one at a time, because its database has a single writer.

Flower itself always answers a request, authentication included, before it is held and again when
there is news. Nothing is held that Flower did not answer with an authenticated "nothing yet".
Without this hook SuperNodes and ServerApp poll (``supernode_polling``, ``app/server/polling.py``).

Replaced: ``flwr.superlink.extensions.get_middleware``, the extension point that Flower's own
commercial edition uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from importlib import import_module
from types import FrameType
from typing import Any, Protocol

from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from .digests import replace
from .hooks import Hook

_EXTENSIONS = "flwr.superlink.extensions"

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Event, Receive, Send], Awaitable[None]]
# ("node", id): its messages; ("reply", id): replies to that message
Key = tuple[str, int | str]

HOLD_FLEET_S = 20.0  # under the client's 30 s and a gateway's usual 60 s
HOLD_RUNTIME_S = 2.0  # between two questions the ServerApp looks who still lives
SETTLE_S = 10.0  # an upload that takes longer no longer hides its message
MOST_HELD = 1000
_PULLS = ("/v1/fleet/pull-messages", "/v1/runtime/pull-messages")
_TASKS = ("/v1/control/start-run", "/v1/runtime/create-task")
_PUSHES = ("/v1/fleet/push-messages", "/v1/runtime/push-messages")
_OBJECTS = ("/v1/fleet/push-object", "/v1/runtime/push-object")
# Everything else that is short, asked often and answered from the database.
_OTHERS = (
    "/v1/fleet/activate-node",
    "/v1/fleet/confirm-message-received",
    "/v1/fleet/deactivate-node",
    "/v1/fleet/get-fab",
    "/v1/fleet/get-run",
    "/v1/fleet/pull-object",
    "/v1/fleet/send-node-heartbeat",
    "/v1/runtime/acquire-task",
    "/v1/runtime/confirm-message-received",
    "/v1/runtime/get-nodes",
    "/v1/runtime/pull-object",
    "/v1/runtime/push-logs",
    "/v1/runtime/send-task-heartbeat",
)


class _Parsed(Protocol):
    @classmethod
    def FromString(cls, data: bytes) -> Any: ...  # noqa: N802  (protobuf's)


_ANSWERS: dict[str, type[_Parsed]] = dict(
    zip(_PULLS, (PullMessagesResponse, PullAppMessagesResponse), strict=True)
)


@dataclass(eq=False)
class HeldRequest:
    """One request for messages that may have to wait."""

    keys: frozenset[Key]
    news: asyncio.Event = field(default_factory=asyncio.Event)
    superseded: bool = False


@dataclass(eq=False)
class Upload:
    """One push of messages whose objects are on their way."""

    keys: frozenset[Key]
    objects: set[str] | None = None  # None: not known yet
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Board:
    """Who waits for what, and which messages are not complete yet. One event loop, no locks."""

    def __init__(self) -> None:
        self.held: set[HeldRequest] = set()
        self.uploads: set[Upload] = set()
        self.closing = False

    def supersede(self, request: HeldRequest) -> None:
        """Let older questions with the same keys go: their asker has come back."""
        for other in self.held:
            if other is not request and other.keys == request.keys:
                other.superseded = True
                other.news.set()

    def finish(self, upload: Upload) -> None:
        """The messages of an upload are complete (or given up): tell who waits for them."""
        if upload.done.is_set():
            return
        self.uploads.discard(upload)
        upload.done.set()
        for request in self.held:
            if request.keys & upload.keys:
                request.news.set()

    def stored(self, object_id: str) -> None:
        """An object has arrived."""
        for upload in list(self.uploads):
            if upload.objects is not None and object_id in upload.objects:
                upload.objects.discard(object_id)
                if not upload.objects:
                    self.finish(upload)

    async def settled(self, keys: frozenset[Key], most_s: float) -> None:
        """Wait until nothing for these keys is half uploaded, at most ``most_s`` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                while waiting := self.uploading(keys):
                    await waiting[0].done.wait()

    def uploading(self, keys: frozenset[Key]) -> list[Upload]:
        """What is half uploaded for these keys."""
        return [upload for upload in self.uploads if upload.keys & keys]

    def close(self) -> None:
        """The SuperLink is stopping: hold nothing any more."""
        self.closing = True
        for request in self.held:
            request.superseded = True
            request.news.set()


class LongPoll:
    """ASGI middleware around the SuperLink's application.

    Args:
        app: the application.
        fleet_s: seconds for which a SuperNode's question is held.
        runtime_s: seconds for which a ServerApp's question is held.
        settle_s: seconds for which a half-uploaded message is kept back.
        new_task: called when a run or another task was accepted.
    """

    def __init__(
        self,
        app: Application,
        fleet_s: float = HOLD_FLEET_S,
        runtime_s: float = HOLD_RUNTIME_S,
        settle_s: float = SETTLE_S,
        new_task: Callable[[], None] = lambda: None,
    ) -> None:
        self._app, self._new_task = app, new_task
        self._hold = dict(zip(_PULLS, (fleet_s, runtime_s), strict=True))
        self._settle_s = settle_s
        self._turn = asyncio.Lock()
        self.board = Board()

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            _before_shutdown(self.board.close)
        path = scope.get("path", "") if scope.get("method") == "POST" else ""
        if path in _PULLS:
            await self._pull(path, scope, receive, send)
        elif path in _PUSHES:
            await self._push(path, scope, receive, send)
        elif path in _OBJECTS:
            await self._object(scope, receive, send)
        elif path in _OTHERS:
            if (body := await _body(receive)) is not None:
                await _send(await self._ask(scope, body), send)
        else:
            await self._app(scope, receive, send)
            if path in _TASKS:
                self._new_task()

    async def _ask(
        self, scope: Event, body: bytes, keys: frozenset[Key] = frozenset()
    ) -> list[Event]:
        """Let Flower answer a request that has been read; its answer, not yet sent.

        Not before what is half uploaded for ``keys`` is complete (or takes too long).

        One at a time: every request writes to SQLite, which has one writer, and whoever finds it
        taken sleeps for up to 0.1 s although it is free again after a millisecond or two. Reading
        and sending is not part of the turn, so no slow client holds up the others.
        """
        events: list[Event] = []
        asked = False

        async def receive() -> Event:
            nonlocal asked
            if asked:  # the client is ours to watch: let the application finish
                await asyncio.Event().wait()
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(event: Event) -> None:
            events.append(event)

        # A copy: the application writes into the scope's state, and may be asked twice.
        copied = {**scope, "state": dict(scope.get("state", {}))}
        clock = asyncio.get_running_loop().time
        end = clock() + self._settle_s
        while True:
            await self.board.settled(keys, end - clock())
            async with self._turn:
                # Another upload may have begun while this request waited for its turn.
                if not self.board.uploading(keys) or clock() >= end:
                    await self._app(copied, receive, send)
                    return events

    async def _pull(self, path: str, scope: Event, receive: Receive, send: Send) -> None:
        if (body := await _body(receive)) is None:
            return
        keys = frozenset(_pull_keys(path, body))
        request = HeldRequest(keys)
        self.board.held.add(request)
        try:
            answer = await self._ask(scope, body, keys)
            if keys and self._may_wait(path, answer):
                self.board.supersede(request)
                if await self._news(request, _spread(self._hold[path], keys), receive):
                    answer = await self._ask(scope, body, keys)
        finally:
            self.board.held.discard(request)
        await _send(answer, send)

    def _may_wait(self, path: str, answer: list[Event]) -> bool:
        if self.board.closing or len(self.board.held) > MOST_HELD:
            return False
        if answer[0].get("status") != 200:
            return False
        kind = _ANSWERS[path]
        response = _parse(kind, b"".join(event.get("body", b"") for event in answer))
        # Nothing was found if it says nothing: every one of these is empty then.
        return response is not None and not response.ListFields()

    async def _news(self, request: HeldRequest, most_s: float, receive: Receive) -> bool:
        """Wait; whether it is worth asking Flower again.

        Never for a client that has gone: Flower counts a message as delivered once it has answered.
        """
        news = asyncio.ensure_future(request.news.wait())
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((news, gone), timeout=most_s, return_when="FIRST_COMPLETED")
            return news.done() and not gone.done() and not request.superseded
        finally:
            for task in (news, gone):
                task.cancel()
            await asyncio.gather(news, gone, return_exceptions=True)

    async def _push(self, path: str, scope: Event, receive: Receive, send: Send) -> None:
        if (body := await _body(receive)) is None:
            return
        upload = Upload(frozenset(_push_keys(path, body)))
        self.board.uploads.add(upload)
        try:
            answer = await self._ask(scope, body)
        except BaseException:
            self.board.finish(upload)
            raise
        kind: type[_Parsed] = PushMessagesResponse if "fleet" in path else PushAppMessagesResponse
        response = None
        if answer[0].get("status") == 200:
            response = _parse(kind, b"".join(event.get("body", b"") for event in answer))
        upload.objects = set(response.objects_to_push) if response is not None else set()
        if upload.objects:
            asyncio.get_running_loop().call_later(self._settle_s, self.board.finish, upload)
        else:
            self.board.finish(upload)
        await _send(answer, send)

    async def _object(self, scope: Event, receive: Receive, send: Send) -> None:
        if (body := await _body(receive)) is None:
            return
        answer = await self._ask(scope, body)
        request = _parse(PushObjectRequest, body) if self.board.uploads else None
        if request is not None:
            self.board.stored(request.object_id)
        await _send(answer, send)


def _spread(most_s: float, keys: frozenset[Key]) -> float:
    """A little less than ``most_s``, each asker its own: nodes in step fall out of step.

    Twenty questions in one moment would keep a round that begins just then waiting for its turn.
    """
    number = sum(key for _, key in keys if isinstance(key, int))
    return most_s * (1 - 0.25 * (number % 97) / 97)


def _pull_keys(path: str, body: bytes) -> Iterable[Key]:
    if "fleet" in path:
        node = _parse(PullMessagesRequest, body)
        return [("node", node.node.node_id)] if node is not None else []
    replies = _parse(PullAppMessagesRequest, body)
    return [("reply", message_id) for message_id in replies.message_ids] if replies else []


def _push_keys(path: str, body: bytes) -> Iterable[Key]:
    kind: type[_Parsed] = PushMessagesRequest if "fleet" in path else PushAppMessagesRequest
    request = _parse(kind, body)
    for message in request.messages_list if request is not None else ():
        if reply_to := message.metadata.reply_to_message_id:
            yield ("reply", reply_to)
        else:
            yield ("node", message.metadata.dst_node_id)


def _parse(kind: type[_Parsed], data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


async def _send(events: Iterable[Event], send: Send) -> None:
    for event in events:
        await send(event)


async def _body(receive: Receive) -> bytes | None:
    """A request's body; ``None`` when the client went away before it was complete."""
    parts = []
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            return None
        parts.append(event.get("body", b""))
        if not event.get("more_body", False):
            return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _before_shutdown(close: Callable[[], None]) -> None:
    """Call ``close`` on SIGINT and SIGTERM before the server's own handler.

    The server waits for open requests before it stops, so held ones would keep it for seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        previous = signal.getsignal(number)
        if not callable(previous):
            continue

        def handle(
            received: int,
            frame: FrameType | None,
            previous: Callable[[int, FrameType | None], Any] = previous,
        ) -> None:
            loop.call_soon_threadsafe(close)
            previous(received, frame)

        signal.signal(number, handle)


def _extension_points() -> list[str]:
    from flwr.superlink import extensions, main
    from flwr.superlink.routers.fleet.router import router

    found = []
    if getattr(main, "extensions", None) is not extensions:
        found.append(
            "expected flwr.superlink.main to take middleware from flwr.superlink.extensions"
        )
    paths = {getattr(route, "path", "") for route in router.routes}
    found += [
        f"expected the Fleet API to have {path}, it has not"
        for path in (*_PULLS, *_PUSHES, *_OBJECTS, *_OTHERS)
        if "fleet" in path and path not in paths
    ]
    return found


HOOK = Hook(
    name="long_polling",
    gives="a SuperNode hears of its message, and a ServerApp of its replies, within milliseconds",
    without="SuperNodes and ServerApp poll, so a round costs seconds more",
    pins={
        _EXTENSIONS: {"get_middleware": "37012f4eb789b63f"},
        "flwr.superlink.main": {
            # 1.42.0 has no middleware for tracing headers.
            "_get_middleware": {"1.41.0": "acdbc2dce1520f8f", "1.42.0": "911d5e2a5aaf11ec"},
        },
        "flwr.superlink.servicer.fleet.fleet_handlers": {
            "pull_messages": "5f1d8861a9eb1465",
            "push_messages": "70c2fe927c6693b0",
            "push_object": "df7e96f1188e0a40",
        },
        "flwr.superlink.servicer.runtime.runtime_handlers": {
            "pull_messages": "8c998d6d197c09e4",
            "push_messages": "03b2ea647465c032",
            "push_object": "b2f9c8ea398e9778",
        },
    },
    check=_extension_points,
)


def install(new_task: Callable[[], None] = lambda: None) -> None:
    """Add the middleware to the SuperLink that this process is about to start.

    Args:
        new_task: called when a run or another task was accepted.
    """
    from starlette.middleware import Middleware

    others = import_module(_EXTENSIONS).get_middleware
    ours = Middleware(LongPoll, new_task=new_task)
    replace(_EXTENSIONS, "get_middleware", lambda: (ours, *others()))
