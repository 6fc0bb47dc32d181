"""compat/retry.py: what a connection to the SuperLink outlasts, and what it does not."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, ObjectUnavailableError
from flwr.supercore.run import RunNotRunningException
from hypothesis import given
from hypothesis import strategies as st

from compat import retry
from compat.retry import Delivery, Retrier
from tests.fake_clock import Clock


def answer(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://superlink/v1/fleet/push-messages")
    return httpx.HTTPStatusError(str(status), request=request, response=httpx.Response(status))


CUT = httpx.ConnectError(
    "[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"
)
PASSING = [CUT, httpx.ReadTimeout(""), ssl.SSLEOFError(), answer(500), answer(503), answer(429)]
FINAL = [answer(400), answer(404), answer(413), ObjectUnavailableError("o"), ValueError()]


class RetryClock(Clock):
    """A clock by which is retried."""

    def retrier(self, draw: Callable[[float, float], float] = lambda low, high: high) -> Retrier:
        return Retrier(self.sleep, self, draw)


class Failing:
    """Fails as told, then answers with what it was given."""

    def __init__(self, *troubles: Exception) -> None:
        self.troubles = list(troubles)
        self.calls: list[Any] = []

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        if self.troubles:
            raise self.troubles.pop(0)
        return arguments


@given(st.lists(st.sampled_from(PASSING), max_size=12), st.floats(0, 1))
def test_what_passes_is_outlasted_with_waits_that_double_to_eight_seconds(troubles, luck):
    clock, function = RetryClock(), Failing(*troubles)
    retrier = clock.retrier(lambda low, high: low + luck * (high - low))
    assert retrier.retrying("try", function)("this") == ("this",)
    assert len(function.calls) == len(troubles) + 1
    for wait, longest in zip(clock.slept, [1, 2, 4, *[8] * 9], strict=False):
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize("trouble", FINAL, ids=repr)
def test_what_does_not_pass_is_said_at_once(trouble):
    clock = RetryClock()
    with pytest.raises(type(trouble)):
        clock.retrier().retrying("try", Failing(trouble))()
    assert clock.slept == []


def test_a_run_that_is_over_is_not_argued_with():
    clock = RetryClock()
    forever = clock.retrier().retrying(
        "try", Failing(RunNotRunningException()), retry.FOR_EVER, retry.always
    )
    with pytest.raises(RunNotRunningException):
        forever()
    assert clock.slept == []


def test_retries_end_after_some_minutes():
    clock, function = RetryClock(), Failing(*[CUT] * 1000)
    with pytest.raises(httpx.ConnectError):
        clock.retrier().retrying("try", function)()
    assert 300 <= clock.now <= 308


def connection(**functions: Any) -> tuple[Any, ...]:
    names = ["receive", "send", "get_run", "get_fab", "pull", "push", "confirm"]
    return (1, *(functions.get(name, Failing()) for name in names))


def test_messages_are_asked_for_for_ever_whatever_goes_wrong():
    clock, receive = RetryClock(), Failing(*[*PASSING, *FINAL] * 100)
    _, ask, *_ = retry.with_retries(connection(receive=receive), clock.retrier())
    assert ask() == ()
    assert clock.now > 3600


def test_a_reply_outlasts_a_gateway_that_restarts():
    clock, send, push = RetryClock(), Failing(CUT, answer(500)), Failing(CUT, answer(502), CUT)
    wrapped = retry.with_retries(connection(send=send, push=push), clock.retrier())
    assert wrapped[2]("message", "tree", 1.0) == ("message", "tree", 1.0)
    wrapped[6](7, "session", "object", b"content")
    assert len(send.calls) == 3
    assert push.calls == [(7, "session", "object", b"content")] * 4


@pytest.mark.parametrize("which", ["get_run", "get_fab"])
def test_a_message_that_cannot_be_worked_on_does_not_end_the_supernode(which):
    functions = {which: Failing(answer(404))}
    wrapped = retry.with_retries(connection(**functions), RetryClock().retrier())
    with pytest.raises(RunNotRunningException):
        wrapped[3 if which == "get_run" else 4](7, "x")


class SuperLink:
    """Stores the objects of one reply, in the session that it gave out last."""

    def __init__(self, *missing: str) -> None:
        self.missing, self.session = set(missing), 0
        self.answers_lost = 0

    def send(self, message: str, tree: str, runtime: float) -> tuple[set[str], str]:
        assert (message, tree, runtime) == ("message", "tree", 1.0)
        self.session += 1
        return set(self.missing), str(self.session)

    def push_object(self, run_id: int, session: str, object_id: str, content: bytes) -> None:
        if session != str(self.session) or object_id not in self.missing:
            raise ObjectPushError(object_id, run_id, session)
        self.missing.remove(object_id)
        if self.answers_lost:
            self.answers_lost -= 1
            raise CUT


def test_an_object_whose_answer_got_lost_is_asked_about_not_sent_twice():
    clock, superlink = RetryClock(), SuperLink("a", "b", "c")
    superlink.answers_lost = 1
    wrapped = retry.with_retries(
        connection(send=superlink.send, push=superlink.push_object), clock.retrier()
    )
    missing, session = wrapped[2]("message", "tree", 1.0)
    for object_id in sorted(missing):
        wrapped[6](7, session, object_id, b"")
    assert superlink.missing == set()
    assert superlink.session == 2


def test_a_session_that_is_over_is_renewed_for_all_that_is_missing():
    superlink = SuperLink("a", "b")
    delivery = Delivery(superlink.send, superlink.push_object)
    missing, session = delivery.send("message", "tree", 1.0)
    superlink.session += 1  # over
    for object_id in sorted(missing):
        delivery.push_object(7, session, object_id, b"")
    assert superlink.missing == set()


def test_an_object_that_is_never_taken_is_an_error():
    superlink = SuperLink("a")
    refuse = Failing(*[ObjectPushError("a", 7, "s")] * 5)
    delivery = Delivery(superlink.send, refuse)
    _, session = delivery.send("message", "tree", 1.0)
    with pytest.raises(ObjectPushError):
        delivery.push_object(7, session, "a", b"")
    assert len(refuse.calls) == 2


def test_flowers_own_waits_and_connections_are_short(monkeypatch):
    from flwr.supercore.retry import http_retry
    from flwr.supernode import fleet_http_connection, start_client_internal

    for module, name in (
        (http_retry, "MAX_RETRY_DELAY"),
        (fleet_http_connection, "FleetHttpClient"),
        (start_client_internal, "http_request_response"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    retry.install()
    waits = http_retry.make_simple_http_retry_invoker().wait_gen_factory()
    assert [next(waits) for _ in range(6)] == [1, 2, 4, 8, 8, 8]
    with fleet_http_connection.FleetHttpClient("https://superlink") as client:
        assert client._client.timeout.connect == 5
        assert client._client.timeout.read == 30, "a question is held for 20 s"
