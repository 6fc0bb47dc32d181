"""A SuperLink's certificate: taken up while it runs, and counted down in its healthcheck."""

from __future__ import annotations

import importlib
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import certs
from certs import files, pki
from compat import certificate_renewal
from superlink import health
from superlink.renewal import Renewal, keep_renewed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certs.issue(tmp_path, [])
    return tmp_path


class Server:
    """A TLS server that answers /health and never closes its context."""

    def __init__(self, folder: Path) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_args: object) -> None:
                """Say nothing."""

        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "superlink.crt", folder / "superlink.key")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = self.context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def shown(self, folder: Path) -> bytes:
        """The certificate that a new connection is shown, PEM."""
        address = ("127.0.0.1", self.port)
        return ssl.get_server_certificate(address, ca_certs=str(folder / "ca.crt")).encode()


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    made = Server(folder)
    yield made
    made.server.shutdown()
    made.server.server_close()


def renewal(folder: Path, server: Server) -> Renewal:
    return Renewal(server.context, folder / "superlink.crt", folder / "superlink.key")


def test_a_renewed_certificate_is_shown_to_new_connections(folder, server):
    watch = renewal(folder, server)
    assert not watch.look()
    before = server.shown(folder)
    assert certs.renew(folder, timedelta(days=366))
    assert watch.look()
    assert server.shown(folder) == (folder / "superlink.crt").read_bytes() != before
    assert not watch.look()


def test_the_certificate_of_a_new_ca_is_taken_up_too(folder, server):
    watch = renewal(folder, server)
    certs.begin_rotation(folder)
    assert not watch.look()
    certs.switch_rotation(folder)
    assert watch.look()
    certs.finish_rotation(folder)
    assert server.shown(folder) == (folder / "superlink.crt").read_bytes()


@pytest.mark.parametrize("what", ["another key's", "damaged", "gone"])
def test_what_does_not_load_is_left_alone(folder, server, tmp_path, what):
    watch = renewal(folder, server)
    before = server.shown(folder)
    path = folder / "superlink.crt"
    if what == "another key's":
        certs.issue(tmp_path / "other", [])
        path.write_bytes((tmp_path / "other" / "superlink.crt").read_bytes())
    elif what == "damaged":
        path.write_text("nothing")
    else:
        path.unlink()
    with pytest.raises(OSError):
        watch.look()
    assert server.shown(folder) == before
    path.write_bytes(before)
    watch.look()
    assert server.shown(folder) == before


def test_watching_outlives_what_does_not_load(folder, server):
    watch = renewal(folder, server)
    stop = threading.Event()
    looks: list[str] = []

    def look() -> bool:
        looks.append("looked")
        if len(looks) == 3:
            stop.set()
        raise OSError("gone")

    watch.look = look  # type: ignore[method-assign]
    watch.watch(stop, every=0.001)
    assert len(looks) == 3


def test_flowers_superlink_hands_out_the_context_that_it_serves_with(monkeypatch, folder):
    import uvicorn

    flower = importlib.import_module("flwr.superlink.cli.flower_superlink")
    assert flower.uvicorn is uvicorn
    monkeypatch.setattr(flower, "uvicorn", uvicorn)
    told: list[dict] = []
    monkeypatch.setattr(uvicorn, "run", lambda **options: told.append(options))
    made: list[ssl.SSLContext] = []
    certificate_renewal.install(made.append)
    flower.uvicorn.run(app="app", ssl_certfile="certificate")
    (options,) = told
    assert options["app"] == "app"
    config = uvicorn.Config(
        lambda *_: None,
        ssl_certfile=folder / "superlink.crt",
        ssl_keyfile=folder / "superlink.key",
        ssl_context_factory=options["ssl_context_factory"],
    )
    config.load()
    assert made == [config.ssl]


def test_a_context_is_watched_over_in_a_thread_that_holds_nothing_up(monkeypatch, folder, server):
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread))
    keep_renewed(server.context, folder / "superlink.crt", folder / "superlink.key")
    assert [(thread.name, thread.daemon) for thread in started] == [("renewal", True)]


# --- the healthcheck ------------------------------------------------------------------------------


def test_nothing_is_said_while_there_is_time(folder, server, capsys):
    assert health.main(["--ca", str(folder / "ca.crt"), "--port", str(server.port)]) == 0
    assert capsys.readouterr() == ("", "")


def test_what_soon_ends_is_said_and_the_superlink_is_well(folder, capsys):
    ca = pki.certificate_from_pem((folder / "ca.crt").read_bytes(), "ca.crt")
    ca_key = pki.key_from_pem((folder / "ca.key").read_bytes(), "ca.key")
    key = pki.key_from_pem((folder / "superlink.key").read_bytes(), "superlink.key")
    made = pki.new_superlink_certificate(
        key,
        ca,
        ca_key,
        pki.DEFAULT_SANS,
        not_before=datetime.now(UTC) - timedelta(days=1),
        lifetime=timedelta(days=11),
    )
    files.write(folder / "superlink.crt", pki.certificate_to_pem(made), files.PUBLIC)
    server = Server(folder)
    try:
        assert health.main(["--ca", str(folder / "ca.crt"), "--port", str(server.port)]) == 0
    finally:
        server.server.shutdown()
        server.server.server_close()
    assert capsys.readouterr().out == (
        "the SuperLink's certificate ends in 9 days: `medfed certs check`\n"
    )
