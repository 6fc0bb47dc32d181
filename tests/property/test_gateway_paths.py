"""Whatever a client asks for, nothing but the listener's own API reaches the SuperLink."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.gateway_stand import NAMES, Stand, needs_nginx, stand

pytestmark = needs_nginx

PIECES = st.sampled_from(
    [
        *("v1", "fleet", "control", "runtime", "start-run", "pull-messages", "acquire-task"),
        *("..", ".", "", "%2e%2e", "%2e", "%2f", "%252f", "%5c", "..%2f", "..;", "\\", "%00", "?"),
        *("#", "*", "%", "%c0%ae%c0%ae", "V1", "FLEET", "~", "health", "docs", "openapi.json"),
    ]
)
PATHS = st.lists(PIECES, max_size=8).map(lambda pieces: "/" + "/".join(pieces))
LIKELY = st.builds(
    lambda api, rest: f"/v1/{api}/{rest}",
    st.sampled_from(["fleet", "control", "runtime"]),
    st.one_of(PATHS, st.text("abc-./%25e\\", max_size=12)),
)
TARGETS = st.one_of(
    PATHS.map(str.encode),
    LIKELY.map(str.encode),
    PATHS.map(lambda path: f"https://superlink{path}".encode()),
    st.binary(max_size=40).map(lambda raw: b"/" + raw.replace(b"\n", b"").replace(b"\r", b"")),
)
METHODS = st.sampled_from([b"POST", b"GET", b"PUT", b"PATCH", b"post", b"CONNECT", b"POST\tX"])


@pytest.fixture(scope="module")
def gateway() -> Iterator[Stand]:
    with stand() as place:
        yield place


@pytest.mark.parametrize(("listener", "api"), [("fleet", "fleet"), ("operator", "control")])
@given(targets=st.lists(st.tuples(METHODS, TARGETS), min_size=1, max_size=10))
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_nothing_but_its_own_api_reaches_the_superlink(
    gateway: Stand, listener: str, api: str, targets: list[tuple[bytes, bytes]]
) -> None:
    gateway.arrived.clear()
    key = gateway.key(NAMES[0]).encode()
    head = b"Host: superlink\r\nflwr-public-key: " + key + b"\r\nContent-Length: 0\r\n"
    sent = b"".join(b"%s %s HTTP/1.1\r\n%s\r\n" % (*one, head) for one in targets)
    last = b"POST / HTTP/1.1\r\n%sConnection: close\r\n\r\n" % head
    answers = b"".join(gateway.stream(listener, sent + last))
    assert answers.startswith((b"HTTP/1.1 ", b"<html>")), "it answers"
    for request in gateway.arrived:
        assert re.fullmatch(f"/v1/{api}/[a-z-]+", request.path)
    passed = gateway.ask(listener, f"/v1/{api}/x", headers={"flwr-public-key": key.decode()})
    assert passed.status in {200, 503}, "and goes on answering"


# Empty lines before a request are allowed, and what follows them is waited for.
@given(noise=st.binary(min_size=1, max_size=400).filter(lambda noise: noise.strip(b"\r\n")))
@settings(max_examples=100, deadline=None)
def test_noise_instead_of_http_is_survived(gateway: Stand, noise: bytes) -> None:
    gateway.arrived.clear()
    gateway.raw("fleet", noise + b"\r\n\r\n")
    assert not gateway.arrived
