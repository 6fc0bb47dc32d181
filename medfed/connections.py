"""The ``flwr`` command's connections to this federation, in the user's own Flower config."""

from __future__ import annotations

import contextlib
import fcntl
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import certificates, files
from common.errors import SuperLinkError
from medfed.paths import Home
from medfed.processes import FederationError, load

DEPLOYMENT, SIMULATION = "local-deployment", "local-simulation"
DEFAULT_ADDRESS = "127.0.0.1:8000"


@dataclass(frozen=True)
class Written:
    """What one call of ``write`` did.

    Args:
        path: the user's Flower config.
        changed: the connections that were added or replaced; empty if both were there already.
        default: the default connection, as before; None if the file has none.
    """

    path: Path
    changed: tuple[str, ...]
    default: str | None


def running_address(home: Home) -> str:
    """The address of the federation that ``medfed up`` started, else the usual one."""
    federation = load(home)
    return DEFAULT_ADDRESS if federation is None else federation.address


def write(address: str, ca: Path, supernodes: int) -> Written:
    """Write both connections through Flower's own functions, keeping what else is in the file.

    Args:
        address: ``HOST:PORT`` of the SuperLink.
        ca: the federation's CA certificate; written as an absolute path.
        supernodes: how many SuperNodes the simulation has.

    Raises:
        SuperLinkError: the CA certificate is missing or is none.
        FederationError: the address is malformed, or the Flower config cannot be read or written.
    """
    import click

    from compat.flower_config import (
        LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE,
        SimulationBackendConfig,
        SimulationClientResources,
        SuperLinkConnection,
        SuperLinkConnectionTomlKey,
        SuperLinkSimulationOptions,
        flower_config,
    )

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise FederationError(
            f"expected the SuperLink's address as HOST:PORT, found {address!r}",
            "for example 127.0.0.1:8000, without https://",
        )
    _check_ca(ca)
    wanted = [
        SuperLinkConnection(
            name=DEPLOYMENT, address=address, root_certificates=str(ca.expanduser().resolve())
        ),
        SuperLinkConnection(
            name=SIMULATION,
            # Flower starts a SuperLink for simulations by itself, on this machine only.
            address=LOCAL_SUPERLINK_ADDRESS_MAGIC_VALUE,
            options=SuperLinkSimulationOptions(
                num_supernodes=supernodes,
                # One core for each client: on 2 cores, two of them train at a time.
                backend=SimulationBackendConfig(
                    client_resources=SimulationClientResources(num_cpus=1, num_gpus=0.0)
                ),
            ),
        ),
    ]
    try:
        # Flower says on standard output that it made the file; that is our news to tell.
        with contextlib.redirect_stdout(io.StringIO()):
            flower_config.init_flwr_config()
        with _locked(flower_config.read_flower_config()[1]):
            before, path = flower_config.read_flower_config()
            section = before.get(SuperLinkConnectionTomlKey.SUPERLINK, {})
            changed = tuple(
                connection.name
                for connection in wanted
                if section.get(connection.name)
                != flower_config.serialize_superlink_connection(connection)
            )
            for connection in wanted:
                if connection.name in changed:
                    flower_config.write_superlink_connection(connection)
    except click.ClickException as error:
        raise FederationError(
            f"expected a Flower config that can be read and written, found: {error.message}",
            "mend or move it; FLWR_HOME says where it is (default: ~/.flwr)",
        ) from None
    except OSError as error:
        raise FederationError(
            f"expected to write the Flower config, found: {error}",
            "FLWR_HOME says where it is (default: ~/.flwr)",
        ) from None
    return Written(path, changed, section.get(SuperLinkConnectionTomlKey.DEFAULT))


@contextlib.contextmanager
def _locked(config: Path) -> Iterator[None]:
    """Two `medfed connect` at a time must not undo each other's writing."""
    with config.open("r") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _check_ca(ca: Path) -> None:
    content = files.read(ca.expanduser(), SuperLinkError)
    if content is None:
        raise SuperLinkError(
            f"expected the CA certificate at {ca}, found no such file",
            "`medfed certs issue` makes one; a coordinator elsewhere hands it out: --ca PATH",
        )
    certificates.read(content, ca, SuperLinkError, "give ca.crt: --ca PATH")
