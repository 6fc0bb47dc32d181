"""Bytes on the wire: what the meter says is what a network would have seen."""

from __future__ import annotations

import json
import socket
import ssl
import threading

import pytest

import certs
from supernode.wire import Meter, Traffic, WireLog, traffic


class Relay(threading.Thread):
    """Passes bytes between a client and a server and counts them, as a network would."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.to_server = self.to_client = 0
        self.port = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.start()

    @property
    def address(self):
        return self.listener.getsockname()

    def run(self):
        client, _ = self.listener.accept()
        server = socket.create_connection(("127.0.0.1", self.port))
        back = threading.Thread(target=self.pump, args=(server, client, "to_client"))
        back.start()
        self.pump(client, server, "to_server")
        back.join()

    def pump(self, source, target, counter):
        while data := source.recv(65536):
            setattr(self, counter, getattr(self, counter) + len(data))
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def server(tmp_path):
    """A TLS server that sends back what it gets, until the client hangs up."""
    certs.issue(tmp_path, [])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.sslsocket_class = ssl.SSLSocket  # it is in this process, and not to be counted
    context.load_cert_chain(tmp_path / "superlink.crt", tmp_path / "superlink.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        plain, _ = listener.accept()
        with context.wrap_socket(plain, server_side=True) as connection:
            while data := connection.recv(65536):
                connection.sendall(data)
            connection.unwrap().close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1], tmp_path / "ca.crt"
    thread.join(10)
    listener.close()


@pytest.fixture
def meter(monkeypatch):
    monkeypatch.setattr(ssl.SSLContext, "sslsocket_class", ssl.SSLSocket)
    meter = Meter()
    meter.install()
    return meter


def test_the_meter_counts_what_crossed_handshake_and_records_included(server, meter):
    port, ca = server
    relay = Relay(port)
    context = ssl.create_default_context(cafile=ca)
    plain = socket.create_connection(relay.address)
    with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        connection.sendall(b"x" * 100_000)
        got = 0
        while got < 100_000:
            got += len(connection.recv(65536))
        open_total = meter.total()
        connection.unwrap()
    relay.join(10)
    assert not relay.is_alive()
    closed = meter.total()
    assert open_total.sent > 100_000
    assert open_total.received > 100_000
    assert 0 <= closed.received - relay.to_client <= 1  # the goodbye, to the kernel a byte
    # The last bytes may not have been acknowledged when the socket was closed.
    assert 0 <= relay.to_server - closed.sent <= 64


def test_plain_connections_are_not_counted(meter):
    listener = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"x" * 1000)
    assert meter.total() == Traffic(0, 0)


def test_a_platform_that_does_not_count_gives_nothing(monkeypatch):
    monkeypatch.delattr(socket, "TCP_INFO")
    with socket.socket() as connection:
        assert traffic(connection) is None


def test_each_line_of_the_log_holds_what_crossed_since_the_last(tmp_path):
    class Fake(Meter):
        def __init__(self):
            self.now = Traffic(0, 0)

        def total(self):
            return self.now

    meter = Fake()
    log = WireLog(tmp_path / "wire.jsonl", meter)
    for total in (Traffic(10, 5), Traffic(30, 6)):
        meter.now = total
        log.reply_left(2**63 + 1)
    lines = [json.loads(line) for line in (tmp_path / "wire.jsonl").read_text().splitlines()]
    assert [(line["sent"], line["received"]) for line in lines] == [(10, 5), (20, 1)]
    assert {line["run_id"] for line in lines} == {str(2**63 + 1)}
