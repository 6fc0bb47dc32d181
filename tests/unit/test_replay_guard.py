"""A SuperNode's signature is good once."""

from __future__ import annotations

import asyncio
import base64

import pytest

from compat import replay_guard
from compat.replay_guard import WINDOW_S, Event, ReplayGuard

PULL = "/v1/fleet/pull-messages"


class SuperLink:
    """An application behind the guard: what it was asked, and what it answers."""

    def __init__(self) -> None:
        self.asked = 0
        self.status = 200
        self.now = 0.0
        self.guard = ReplayGuard(self.answer, lambda: self.now)
        self.gate = asyncio.Event()
        self.gate.set()

    async def answer(self, _scope: Event, _receive: object, send: replay_guard.Send) -> None:
        self.asked += 1
        await self.gate.wait()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask(
        self, time: str = "t1", key: bytes = b"key", path: str = PULL, signature: str = "s"
    ) -> int:
        headers = {
            "flwr-public-key": base64.b64encode(key).decode(),
            "flwr-timestamp": time,
            "flwr-signature": signature,
        }
        sent: list[Event] = []

        async def send(event: Event) -> None:
            sent.append(event)

        async def receive() -> Event:
            return {"type": "http.request", "body": b""}

        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.guard({"type": "http", "path": path, "headers": pairs}, receive, send)
        return int(sent[0]["status"])


@pytest.fixture
def superlink() -> SuperLink:
    return SuperLink()


def test_a_second_use_is_refused_and_never_reaches_the_superlink(superlink: SuperLink) -> None:
    assert asyncio.run(superlink.ask()) == 200
    assert asyncio.run(superlink.ask()) == 401
    assert superlink.asked == 1


def test_the_same_key_and_time_under_another_signature_are_a_second_use(
    superlink: SuperLink,
) -> None:
    assert asyncio.run(superlink.ask(signature="r, s")) == 200
    assert asyncio.run(superlink.ask(signature="r, n - s")) == 401


def test_another_time_or_another_key_is_a_first_use(superlink: SuperLink) -> None:
    for time, key in (("t1", b"a"), ("t2", b"a"), ("t1", b"b")):
        assert asyncio.run(superlink.ask(time, key)) == 200


def test_a_signature_used_on_one_path_is_used_up_on_all(superlink: SuperLink) -> None:
    assert asyncio.run(superlink.ask(path="/v1/fleet/send-node-heartbeat")) == 200
    assert asyncio.run(superlink.ask(path="/v1/fleet/push-messages")) == 401


def test_two_copies_at_once_are_one_use(superlink: SuperLink) -> None:
    async def both() -> list[int]:
        superlink.gate = asyncio.Event()
        first = asyncio.ensure_future(superlink.ask())
        await asyncio.sleep(0)
        second = await superlink.ask()
        superlink.gate.set()
        return [await first, second]

    assert asyncio.run(both()) == [200, 401]


def test_what_the_superlink_denied_is_not_remembered(superlink: SuperLink) -> None:
    superlink.status = 401  # a signature that is none must not use up the node's real one
    assert asyncio.run(superlink.ask()) == 401
    superlink.status = 200
    assert asyncio.run(superlink.ask()) == 200


def test_it_remembers_for_as_long_as_flower_accepts_and_then_forgets(superlink: SuperLink) -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert asyncio.run(superlink.ask("old")) == 200
    superlink.now = TIMESTAMP_TOLERANCE + 2 * SYSTEM_TIME_TOLERANCE
    assert asyncio.run(superlink.ask("old")) == 401
    superlink.now = WINDOW_S + 1
    assert asyncio.run(superlink.ask("new")) == 200
    assert len(superlink.guard._seen) == 1, "what Flower itself calls stale takes no memory"


def test_other_apis_are_none_of_its_business(superlink: SuperLink) -> None:
    for _ in range(2):
        assert asyncio.run(superlink.ask(path="/v1/runtime/pull-messages")) == 200


def test_flowers_own_signer_never_signs_the_same_twice() -> None:
    """The guard's assumption: each attempt, also a repeated one, has a time of its own."""
    import httpx
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.supercore.protobuf.client import ProtobufRequestContext
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    key = ec.generate_private_key(ec.SECP384R1())
    signer = NodeAuthHttpInterceptor(key, key.public_key())
    identities = set()
    for _ in range(50):
        request = httpx.Request("POST", f"https://superlink{PULL}")
        context = ProtobufRequestContext("rpc", None, request)  # type: ignore[arg-type]
        signer.intercept(context, lambda _: httpx.Response(200))
        pairs = [(name.lower(), value) for name, value in request.headers.raw]
        identities.add(replay_guard._identity({"type": "http", "path": PULL, "headers": pairs}))
    assert None not in identities
    assert len(identities) == 50


def test_it_stands_in_front_of_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.superlink import extensions
    from starlette.middleware import Middleware

    other = Middleware(object)  # type: ignore[arg-type]
    monkeypatch.setattr(extensions, "get_middleware", lambda: (other,))
    replay_guard.install()
    assert [middleware.cls for middleware in extensions.get_middleware()] == [ReplayGuard, object]
