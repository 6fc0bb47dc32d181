"""``medfed connect``: make the federation known to the ``flwr`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def connect(
    superlink: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The SuperLink's address (default: that of `medfed up`, else 127.0.0.1:8000).",
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(help="The federation's CA certificate (default: the one in MEDFED_HOME)."),
    ] = None,
) -> None:
    """Write the connections local-deployment and local-simulation into your Flower config.

    After it, `flwr run . local-deployment` and `flwr run . local-simulation` work. Everything else
    in the file stays as it is, the default connection too.
    """
    from medfed import connections
    from medfed.paths import Home
    from supernode import roster

    home = Home.from_environment()
    written = connections.write(
        address=superlink or connections.running_address(home),
        ca=ca or home.certs / "ca.crt",
        supernodes=roster.load().num_partitions,
    )
    print(f"{written.path}:")
    for name in (connections.DEPLOYMENT, connections.SIMULATION):
        print(f"  {name}: {'written' if name in written.changed else 'as it was'}")
    print(f"default connection: {written.default or 'none'}")
