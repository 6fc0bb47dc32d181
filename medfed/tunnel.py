"""A way for programs that have no client certificate to a gateway that demands one.

The ``flwr`` command of Flower 1.41 verifies who it talks to, but cannot show a certificate of its
own. So it talks to a port of this machine's loopback address, over TLS as well, and what arrives
there goes on over a connection that shows the operator's certificate. stunnel would do the same,
but it is a system package, and an operator's laptop has Python and medfed.
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import certs
from common.errors import MedfedError

HOST = "127.0.0.1"
_PIECE = 1 << 16
_TIMEOUT_S = 10.0


class TunnelError(MedfedError):
    """The gateway cannot be reached with this certificate."""


@dataclass(frozen=True)
class Route:
    """Where a tunnel leads, and as whom.

    Args:
        gateway: ``HOST:PORT`` of the gateway's remote operator listener.
        ca: the federation's CA certificate.
        certificate: the operator's certificate.
        key: its private key.
    """

    gateway: str
    ca: Path
    certificate: Path
    key: Path

    @property
    def address(self) -> tuple[str, int]:
        """Host and port.

        Raises:
            TunnelError: ``gateway`` has another form.
        """
        host, _, port = self.gateway.rpartition(":")
        if not host or not port.isdigit():
            raise TunnelError(
                f"expected the gateway's address as HOST:PORT, found {self.gateway!r}",
                "for example coordinator.example.org:8444",
            )
        return host, int(port)

    def context(self) -> ssl.SSLContext:
        """TLS towards the gateway.

        Raises:
            TunnelError: a file cannot be read, or the key is not the certificate's.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(cafile=str(self.ca))
            context.load_cert_chain(self.certificate, self.key)
        except OSError as error:  # ssl.SSLError is one
            raise TunnelError(
                f"expected the CA in {self.ca} and a certificate in {self.certificate} with its "
                f"key in {self.key}, found: {error.strerror or error}",
                "the coordinator has operator.crt and operator.key: `medfed certs issue`",
            ) from None
        return context


def check(route: Route) -> None:
    """See that the gateway lets this operator in.

    Raises:
        TunnelError: it cannot be reached, is not this CA's, or refuses the certificate.
    """
    host, port = route.address
    connection = http.client.HTTPSConnection(
        host, port, timeout=_TIMEOUT_S, context=route.context()
    )
    try:
        connection.request("POST", "/v1/control/list-nodes", b"", {"Content-Length": "0"})
        response = connection.getresponse()
        found = response.read(1000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise TunnelError(
            f"expected the operators' gateway at {route.gateway}, found: {error}",
            "MEDFED_OPERATOR says where it listens; is that name in its certificate?",
        ) from None
    finally:
        connection.close()
    if response.status in {400, 403}:
        raise TunnelError(
            f"expected {route.gateway} to let {route.certificate} in, found it refused: "
            f"{_words(found)}",
            "`medfed certs check` says when operator.crt ends, `medfed certs renew` renews it",
        )


def _words(page: str) -> str:
    """What a page of nginx's says, without its markup."""
    title = page.partition("<title>")[2].partition("</title>")[0]
    return title or page.strip()


def local_ca(folder: Path) -> Path:
    """The CA to trust at the tunnel's near end: made for this machine, kept in ``folder``."""
    certs.issue(folder, ())
    return folder / "ca.crt"


def serve(route: Route, folder: Path, port: int, ready: Callable[[int], None]) -> None:
    """Pass connections on until interrupted.

    Args:
        route: where to.
        folder: where ``local_ca`` keeps the near end's certificate.
        port: local port; 0: any free one.
        ready: called with the port once it is listened to.

    Raises:
        TunnelError: the port is taken, or the route cannot be used.
    """
    asyncio.run(_serve(route, folder, port, ready))


async def _serve(route: Route, folder: Path, port: int, ready: Callable[[int], None]) -> None:
    host, far_port = route.address
    far = route.context()
    near = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    near.load_cert_chain(folder / "superlink.crt", folder / "superlink.key")

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            theirs, ours = await asyncio.open_connection(host, far_port, ssl=far)
        except OSError:
            writer.close()  # the client sees a connection that ended, and says so
            return
        await asyncio.gather(_pump(reader, ours), _pump(theirs, writer))

    try:
        server = await asyncio.start_server(connect, HOST, port, ssl=near)
    except OSError as error:
        raise TunnelError(
            f"expected to listen on {HOST} port {port}, found: {error.strerror}",
            "choose another one: --port",
        ) from None
    async with server:
        ready(int(server.sockets[0].getsockname()[1]))
        await server.serve_forever()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Pass on what comes until it ends; then the other side ends too."""
    try:
        while piece := await source.read(_PIECE):
            sink.write(piece)
            await sink.drain()
    except OSError:
        pass  # a side that is gone has said all it will
    finally:
        sink.close()
