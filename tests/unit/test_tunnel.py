"""The tunnel: Flower's own client reaches a gateway that demands a client certificate."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control import ControlHttpClient

import certs
from medfed import tunnel
from medfed.tunnel import Route, TunnelError
from tests.gateway_stand import CONTROL, Stand, needs_nginx, stand, until

pytestmark = needs_nginx


@pytest.fixture(scope="module")
def gateway() -> Iterator[Stand]:
    with stand() as place:
        yield place


def route(place: Stand, certificate: Path) -> Route:
    port = place.ports["remote-operator"]
    return Route(
        f"localhost:{port}", place.pki / "ca.crt", certificate, certificate.with_suffix(".key")
    )


def test_flowers_client_gets_through_and_the_gateway_knows_who_it_was(
    gateway: Stand, tmp_path: Path
) -> None:
    way = route(gateway, gateway.pki / "operator.crt")
    environment = {**os.environ, "MEDFED_HOME": str(tmp_path), "FLWR_HOME": str(tmp_path / "flwr")}
    command = [
        *(sys.executable, "-m", "medfed.cli", "tunnel", way.gateway, "--port", "0"),
        *("--certificate", str(way.certificate), "--key", str(way.key), "--ca", str(way.ca)),
    ]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith(f"local-deployment leads to {way.gateway} through 127.0.0.1:")
        address = said.split("through ")[1].split(";")[0]
        assert address in (tmp_path / "flwr" / "config.toml").read_text()
        near_ca = (tmp_path / "tunnel" / "ca.crt").read_bytes()
        gateway.arrived.clear()
        with (
            ControlHttpClient.from_server_address(
                address, insecure=False, root_certificates=near_ca, interceptors=[]
            ) as client,
            pytest.raises(ValueError, match="Invalid protobuf response"),
        ):
            client.ListNodes(ListNodesRequest())  # the stand-in behind the gateway speaks JSON
        assert [request.path for request in gateway.arrived] == [CONTROL]
        until(lambda: gateway.said('"operator":"medfed operator"'), gateway.tail)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0


def test_a_good_certificate_is_found_good(gateway: Stand) -> None:
    tunnel.check(route(gateway, gateway.pki / "operator.crt"))


def test_another_federations_certificate_is_found_refused(gateway: Stand, tmp_path: Path) -> None:
    certs.issue(tmp_path / "other", ())
    mallory = route(gateway, tmp_path / "other" / "operator.crt")
    with pytest.raises(TunnelError, match="found it refused: 400 The SSL certificate error"):
        tunnel.check(mallory)


def test_another_federations_gateway_is_not_talked_to(gateway: Stand, tmp_path: Path) -> None:
    certs.issue(tmp_path / "other", ())
    alice = tmp_path / "other" / "operator.crt"
    port = gateway.ports["remote-operator"]
    way = Route(
        f"localhost:{port}", tmp_path / "other" / "ca.crt", alice, alice.with_suffix(".key")
    )
    gateway.arrived.clear()
    with pytest.raises(TunnelError, match="certificate verify failed"):
        tunnel.check(way)
    assert not gateway.arrived


def test_a_key_of_another_certificate_is_said(gateway: Stand) -> None:
    alice = gateway.pki / "operator.crt"
    way = Route("localhost:1", gateway.pki / "ca.crt", alice, gateway.pki / "superlink.key")
    with pytest.raises(TunnelError, match=r"with its key .*found: "):
        way.context()


def test_the_near_end_is_tls_too_with_a_ca_of_its_own(gateway: Stand, tmp_path: Path) -> None:
    ca = tunnel.local_ca(tmp_path / "tunnel")
    assert ca.read_bytes() != (gateway.pki / "ca.crt").read_bytes()
    assert ssl.create_default_context(cafile=str(ca)).get_ca_certs()
