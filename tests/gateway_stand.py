"""A gateway under test: real nginx by superlink.gateway, in front of a server that takes notes."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

import certs

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx") is None, reason="needs nginx: apt-get install nginx-light"
)
NAMES = ("hospital-a", "hospital-b")
FLEET = "/v1/fleet/pull-messages"
CONTROL = "/v1/control/list-nodes"


@dataclass
class Request:
    """What arrived at the SuperLink's place."""

    path: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclass
class Answer:
    """What a client got."""

    status: int
    body: str


@dataclass
class Stand:
    """Addresses, files and what arrived."""

    folder: Path
    ports: dict[str, int]
    arrived: list[Request] = field(default_factory=list)
    log: Path = Path()

    @property
    def pki(self) -> Path:
        return self.folder / "certs"

    def key(self, name: str) -> str:
        """What the SuperNode of that name sends as its public key."""
        public = load_ssh_public_key((self.pki / "supernodes" / f"{name}.pub").read_bytes())
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return base64.b64encode(pem).decode()

    def trust(self) -> ssl.SSLContext:
        """A client's TLS context that trusts the federation's CA."""
        return ssl.create_default_context(cafile=str(self.pki / "ca.crt"))

    def ask(
        self,
        listener: str,
        path: str,
        *,
        method: str = "POST",
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        context: ssl.SSLContext | None = None,
    ) -> Answer:
        """One request over a connection of its own."""
        connection = http.client.HTTPSConnection(
            "localhost", self.ports[listener], timeout=20, context=context or self.trust()
        )
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Answer(response.status, response.read().decode())
        finally:
            connection.close()

    def fleet(self, path: str = FLEET, name: str = NAMES[0], **more: object) -> Answer:
        """One request as the institution ``name``."""
        return self.ask("fleet", path, headers={"flwr-public-key": self.key(name)}, **more)  # type: ignore[arg-type]

    def stream(self, listener: str, sent: bytes) -> Iterator[bytes]:
        """All that is answered to these bytes, until the gateway hangs up."""
        with (
            socket.create_connection(("127.0.0.1", self.ports[listener]), timeout=20) as plain,
            self.trust().wrap_socket(plain, server_hostname="localhost") as stream,
        ):
            stream.sendall(sent)
            while piece := stream.recv(65536):
                yield piece

    def raw(self, listener: str, sent: bytes) -> bytes:
        """The first of what is answered to these bytes; b"" if nothing is."""
        return next(self.stream(listener, sent), b"")

    def said(self, words: str) -> bool:
        """Whether the gateway's log has these words."""
        return words in self.log.read_text()

    def tail(self) -> str:
        """The end of the gateway's log."""
        return self.log.read_text()[-2000:]


def until(what: Callable[[], bool], message: Callable[[], str], deadline_s: float = 20.0) -> None:
    """Wait for ``what`` to be observed."""
    end = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < end, message()
        time.sleep(0.05)


@contextmanager
def stand(serve: Callable[[Path], Path] | None = None) -> Iterator[Stand]:
    """A gateway with all its listeners, and a SuperLink's stand-in behind it.

    Args:
        serve: PKI folder → folder with the ``superlink.crt`` and ``superlink.key`` that the
            stand-in uses; default: the gateway's own.
    """
    folder = Path(tempfile.mkdtemp(prefix="medfed-gateway-"))
    folder.chmod(0o711)  # nginx started by root works as another user
    try:
        certs.issue(folder / "certs", NAMES)
        place = Stand(folder, {name: _free_port() for name in _LISTENERS}, log=folder / "log")
        pair = serve(place.pki) if serve else place.pki
        with _superlink(place, pair) as port, _gateway(place, port):
            yield place
    finally:
        shutil.rmtree(folder)


_LISTENERS = ("fleet", "operator", "remote-operator", "health")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _superlink(place: Stand, pair: Path) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def note(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            place.arrived.append(Request(self.path, list(self.headers.items()), body))
            answer = json.dumps({"bytes": len(body)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_HEAD = do_OPTIONS = do_DELETE = note  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a gateway that does not trust the certificate hangs up

    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair / "superlink.crt", pair / "superlink.key")
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def _gateway(place: Stand, superlink: int) -> Iterator[None]:
    scratch = place.folder / "scratch"
    scratch.mkdir(mode=0o711)
    command = [
        *(sys.executable, "-m", "superlink.gateway"),
        *("--superlink", f"127.0.0.1:{superlink}", "--superlink-name", "localhost"),
        *("--certificate", str(place.pki / "superlink.crt")),
        *("--key", str(place.pki / "superlink.key")),
        *("--ca", str(place.pki / "ca.crt")),
        *("--public-keys", str(place.pki / "supernodes")),
        *("--scratch", str(scratch)),
    ]
    for listener in _LISTENERS:
        command += [f"--{listener}", f"127.0.0.1:{place.ports[listener]}"]
    with place.log.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[1])
    try:
        until(lambda: _answers(place, process), place.tail)
        yield
    finally:
        process.terminate()
        process.wait(20)


def _answers(place: Stand, process: subprocess.Popen[bytes]) -> bool:
    """Whether nginx itself answers: `nginx -t`, which the gateway runs first, listens too."""
    assert process.poll() is None, place.tail()
    try:
        return place.ask("fleet", "/").status == 403
    except OSError:
        return False
