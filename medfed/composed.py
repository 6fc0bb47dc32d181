"""The Compose federation seen from this machine: its address, and the CA's certificate."""

from __future__ import annotations

import subprocess
from pathlib import Path

from common.errors import MedfedError
from common.files import replacing

_CA_IN_SUPERLINK = "superlink:/medfed/certs/ca.crt"


class ComposeError(MedfedError):
    """The Compose federation cannot be reached from this machine."""


def published_address(project: Path) -> str:
    """``HOST:PORT`` at which this machine reaches the running federation's Control API.

    Raises:
        ComposeError: Docker Compose is not there, or the SuperLink does not run.
    """
    return _compose(project, "port", "operator", "8000")


def fetch_ca(project: Path, place: Path) -> None:
    """Copy the CA's certificate out of the running SuperLink to ``place``.

    Raises:
        ComposeError: Docker Compose is not there, or the SuperLink does not run.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as draft:
        _compose(project, "cp", _CA_IN_SUPERLINK, str(draft))


def fetch_run(project: Path, run_id: int, place: Path) -> None:
    """Copy the record of a run out of the SuperLink's container to the folder ``place``.

    Raises:
        ComposeError: Docker Compose is not there, the SuperLink does not run, or has no such run.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _compose(project, "cp", f"superlink:/medfed/runs/{run_id}", str(place))


def _compose(project: Path, *arguments: str) -> str:
    """Output of ``docker compose ARGUMENTS`` in the folder of the Compose files."""
    command = ["docker", "compose", *arguments]
    try:
        done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ComposeError(
            "expected the command docker, found none", "install Docker with its Compose plugin"
        ) from None
    if done.returncode != 0:
        found = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ComposeError(
            f"expected the SuperLink's container to run, found: {found}",
            "docker compose up --detach, in the folder of docker-compose.yml",
        )
    return done.stdout.strip()
