"""supernode/enrolment.py: what a SuperNode that starts waits for, and what it does not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.supercore.error import ApiErrorCode
from flwr.supernode.fleet_http_client import FleetHttpClient

import certs
from common.errors import SuperNodeError
from supernode import enrolment
from supernode.command import Settings
from supernode.roster import SuperNodeEntry

NAME = "supernode-00"


def refusal(status: int, code: int | None = None, text: str = "") -> httpx.HTTPStatusError:
    content = json.dumps({"code": code, "detail": "no"}) if code else text
    request = httpx.Request("POST", "https://superlink/v1/fleet/activate-node")
    response = httpx.Response(status, text=content, request=request)
    return httpx.HTTPStatusError(str(status), request=request, response=response)


ONLINE_ALREADY = refusal(400, ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)


class SuperLink:
    """Answers activations and deactivations as it is told, then with yes."""

    def __init__(self) -> None:
        self.activations: list[Exception] = []
        self.deactivations: list[Exception] = []
        self.deactivated: list[int] = []
        self.registered = True

    def __enter__(self) -> SuperLink:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:  # noqa: N802
        if request.heartbeat_interval == 0:
            unknown = ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
            known = ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL
            raise refusal(400, known if self.registered else unknown)
        if self.activations:
            raise self.activations.pop(0)
        return ActivateNodeResponse(node_id=5)

    def DeactivateNode(self, request: Any) -> None:  # noqa: N802
        if self.deactivations:
            raise self.deactivations.pop(0)
        self.deactivated.append(request.node_id)


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SuperLink:
    made = SuperLink()
    monkeypatch.setattr(FleetHttpClient, "from_server_address", lambda *a, **k: made)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    return made


Enrol = Callable[..., tuple[int, list[str], list[float]]]


@pytest.fixture
def enrol(superlink: SuperLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Enrol:
    folder = tmp_path / "certs"
    certs.issue(folder, [NAME])
    settings = Settings(
        entry=SuperNodeEntry(NAME, 0, 1.0, None),
        partition=0,
        num_partitions=1,
        superlink="superlink:8000",
        ca=folder / "ca.crt",
        key=folder / "supernodes" / f"{NAME}.key",
        public_keys=folder / "supernodes",
        data=tmp_path,
    )

    def run(timeout: float = 75.0) -> tuple[int, list[str], list[float]]:
        said: list[str] = []
        slept: list[float] = []
        monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
        node = enrolment.enrol(settings, timeout, say=said.append, sleep=slept.append)
        return node, said, slept

    return run


def test_a_key_that_is_free_is_taken_at_once(enrol, superlink):
    assert enrol() == (5, [], [])
    assert superlink.deactivated == [5], "Flower activates it itself, next"


def test_the_end_of_the_session_before_is_waited_for_and_said_once(enrol, superlink):
    superlink.activations = [ONLINE_ALREADY] * 20
    node, said, slept = enrol()
    assert (node, slept) == (5, [3.0] * 20)
    (line,) = said
    assert "waiting for the session before this one to count as offline" in line
    assert line.startswith(NAME)


def test_another_supernode_with_the_same_key_is_waited_for_no_longer(enrol, superlink):
    superlink.activations = [ONLINE_ALREADY] * 1000
    with pytest.raises(SuperNodeError, match="counts as online") as caught:
        enrol()
    assert "another one running with this key" in caught.value.hint


@pytest.mark.parametrize(
    "trouble", [refusal(500), refusal(502), refusal(503), httpx.ConnectError("refused")], ids=str
)
def test_a_superlink_that_is_not_up_yet_is_waited_for(enrol, superlink, trouble):
    superlink.activations = [trouble] * 100
    node, said, slept = enrol()
    assert (node, len(said), len(slept)) == (5, 1, 100)


def test_a_goodbye_that_got_lost_is_said_again(enrol, superlink):
    """Else the SuperNode would wait for its own activation to end."""
    superlink.deactivations = [httpx.ReadError("cut")]
    enrol()
    assert superlink.deactivated == [5, 5]


def test_an_unregistered_key_is_refused_at_once(enrol, superlink):
    superlink.registered = False
    with pytest.raises(SuperNodeError, match="to be registered") as caught:
        enrol()
    assert f"flwr supernode register {NAME}.pub" in caught.value.hint


def test_a_signature_that_is_denied_is_refused_at_once(enrol, superlink):
    superlink.activations = [refusal(401, text="denied")]
    with pytest.raises(SuperNodeError, match="found it denied"):
        enrol()
