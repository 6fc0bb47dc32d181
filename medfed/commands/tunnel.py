"""``medfed tunnel``: the ``flwr`` command on an operator's machine, with a client certificate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tunnel(
    gateway: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The operators' gateway.")],
    certificate: Annotated[
        Path | None,
        typer.Option(help="The operator's certificate (default: operator.crt in MEDFED_HOME)."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="Its private key (default: beside it, with .key).")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(help="The federation's CA certificate (default: the one in MEDFED_HOME)."),
    ] = None,
    port: Annotated[int, typer.Option(help="Local port.")] = 8000,
) -> None:
    """Let `flwr run . local-deployment` reach a gateway that demands a client certificate.

    It listens on 127.0.0.1 and passes on until Ctrl-C; while it runs, whoever is logged in on this
    machine can use it.
    """
    from medfed import connections, tunnel
    from medfed.paths import Home
    from supernode import roster

    home = Home.from_environment()
    certificate = certificate or home.certs / "operator.crt"
    route = tunnel.Route(
        gateway, ca or home.certs / "ca.crt", certificate, key or certificate.with_suffix(".key")
    )
    tunnel.check(route)
    near = home.root / "tunnel"
    near_ca = tunnel.local_ca(near)

    def ready(listening: int) -> None:
        address = f"{tunnel.HOST}:{listening}"
        connections.write(address, near_ca, supernodes=roster.load().num_partitions)
        print(f"local-deployment leads to {gateway} through {address}; Ctrl-C ends it", flush=True)

    try:
        tunnel.serve(route, near, port, ready)
    except KeyboardInterrupt:
        return
