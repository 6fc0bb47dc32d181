"""What Flower's SuperLink is started with: its arguments and its environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DEFAULT_PORT = 8000


@dataclass(frozen=True)
class Settings:
    """One SuperLink, ready to start.

    Args:
        certificate: its TLS certificate.
        key: the certificate's private key.
        ca: the federation's CA certificate.
        database: the SQLite file of its durable state.
        institutions: the SuperNodes' names, for the ServerApp to say which ones are missing.
        host: the address to listen on.
        port: the one port of its Fleet, Control and Runtime APIs.
    """

    certificate: Path
    key: Path
    ca: Path
    database: Path
    institutions: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT


def arguments(settings: Settings) -> list[str]:
    """The argument list of ``flower-superlink``, its own name first."""
    return [
        "flower-superlink",
        *("--ssl-certfile", str(settings.certificate)),
        *("--ssl-keyfile", str(settings.key)),
        *("--ssl-ca-certfile", str(settings.ca)),
        *("--database", str(settings.database)),
        "--enable-supernode-auth",
        # Else each run would install its dependencies with uv: a network, and another environment.
        "--disable-runtime-dependency-installation",
        *("--host", settings.host),
        *("--port", str(settings.port)),
    ]


def environment(settings: Settings, inherited: Mapping[str, str], programs: Path) -> dict[str, str]:
    """The environment of the SuperLink and of every ServerApp that it starts.

    Args:
        settings: the SuperLink.
        inherited: what to start from, usually ``os.environ``.
        programs: the folder of ``flwr-serverapp``, which SuperExec (a thread of the SuperLink)
            looks up on PATH: first there, so that no other installation is picked up.
    """
    variables = dict(inherited)
    variables["PATH"] = f"{programs}:{inherited.get('PATH', '')}".rstrip(":")
    variables["FLWR_TELEMETRY_ENABLED"] = "0"
    variables["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    if settings.institutions:
        variables["MEDFED_INSTITUTIONS"] = ",".join(settings.institutions)
    return variables
