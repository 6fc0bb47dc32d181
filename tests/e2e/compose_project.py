"""One Compose project of the tests: a name of its own, a port of its own, gone at the end."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
from docker.models.containers import Container

from supernode import roster

ROOT = Path(__file__).resolve().parents[2]
NAMES = roster.load().names
COORDINATOR = ("superlink", "gateway", "operator")
FEDERATION = (*COORDINATOR, *NAMES)
GATED = ("--file", "docker-compose.yml", "--file", "docker-compose.gate.yml")
ONLINE_WITHIN_S = 120.0
PREFIX = "medfed-e2e-"  # .ci/run removes what a killed test session left behind by it


class ComposeProject:
    """``docker compose`` in the repository, and what the engine says about its containers."""

    def __init__(self) -> None:
        self.name = PREFIX + secrets.token_hex(3)
        self.port, self.fleet_port, self.remote_port = _free_ports(3)
        self.client = docker.from_env()
        # Not the developer's own 10.77, nor that of another test session.
        self.subnets = f"10.{80 + secrets.randbelow(170)}"
        self.environment = {
            **{key: value for key, value in os.environ.items() if key != "COMPOSE_FILE"},
            "COMPOSE_PROJECT_NAME": self.name,
            "MEDFED_PORT": str(self.port),
            "MEDFED_FLEET": f"127.0.0.1:{self.fleet_port}",
            "MEDFED_OPERATOR": f"127.0.0.1:{self.remote_port}",
            "MEDFED_SUBNETS": self.subnets,
            "MEDFED_TAG": "e2e",
        }

    def keep_runs_on_a_small_volume(self) -> None:
        """Make the volume of runs before Compose does: in memory, and small enough to be full.

        What is in it is gone once no container uses it, so one does until the project is removed.
        """
        name = f"{self.name}_runs"
        self.client.volumes.create(
            name,
            driver="local",
            driver_opts={
                "type": "tmpfs",
                "device": "tmpfs",
                "o": "size=64m,uid=10001,gid=10001,mode=0700",
            },
            labels={
                "com.docker.compose.project": self.name,
                "com.docker.compose.volume": "runs",
            },
        )
        self.client.containers.run(
            "medfed/superlink:e2e",
            ["infinity"],
            entrypoint="sleep",
            name=f"{self.name}-keeper",
            volumes={name: {"bind": "/runs", "mode": "ro"}},
            init=True,
            network_disabled=True,
            detach=True,
        )

    def compose(
        self, *arguments: str, timeout: float = 300, stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run one Compose command, deaf to the developer's own ``.env``."""
        command = ["docker", "compose", "--env-file", os.devnull, *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode != 0:
            output = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            raise AssertionError(f"{' '.join(arguments)}: exit {done.returncode}\n{output}")
        return done

    def config(self, *files: str) -> dict[str, Any]:
        """The whole configuration as Compose resolves it from these files."""
        options = [option for file in files for option in ("--file", file)]
        resolved = self.compose(*options, "config", "--format", "json")
        found: dict[str, Any] = json.loads(resolved.stdout)
        return found

    def container(self, service: str) -> Container:
        """The service's container, running or not."""
        (found,) = self.client.containers.list(
            all=True,
            filters={
                "label": [
                    f"com.docker.compose.project={self.name}",
                    f"com.docker.compose.service={service}",
                    "com.docker.compose.oneoff=False",
                ]
            },
        )
        return found

    def containers(self, *services: str) -> Iterator[tuple[str, Container]]:
        """Each service (default: all that stay up) and its container."""
        for service in services or FEDERATION:
            yield service, self.container(service)

    def health(self) -> dict[str, str]:
        """Service → "starting", "healthy" or "unhealthy", or its state if it has no health."""
        found = {}
        for container in self.client.containers.list(
            all=True, filters={"label": f"com.docker.compose.project={self.name}"}
        ):
            service = container.labels["com.docker.compose.service"]
            if service in FEDERATION:
                state = self.client.api.inspect_container(container.id)["State"]
                found[service] = state.get("Health", {}).get("Status", state["Status"])
        return found

    def python(self, service: str, code: str) -> str:
        """What ``code`` prints in the service's container, run by Python as the service's user."""
        status, output = self.container(service).exec_run(["python3", "-c", code])
        text = str(output.decode())
        assert status == 0, f"{service}: {text}"
        return text.strip()

    def keep_logs(self, folder: Path) -> None:
        """Write every container's state and log into ``folder``."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for container in self.client.containers.list(
            all=True, filters={"label": f"com.docker.compose.project={self.name}"}
        ):
            state = json.dumps(container.attrs["State"], indent=2)
            (folder / f"{container.name}.state.json").write_text(state)
            (folder / f"{container.name}.log").write_bytes(container.logs())

    def remove(self) -> None:
        """Remove containers, networks and volumes of this project, and nothing else."""
        for keeper in self.client.containers.list(filters={"name": f"{self.name}-keeper"}):
            keeper.remove(force=True)
        # With the gates' file, whose volumes are gone too then.
        down = ("down", "--volumes", "--remove-orphans", "--timeout", "10")
        self.compose(*GATED, *down, timeout=300, check=False)
        self.client.close()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass(frozen=True)
class Federation:
    """A federation in containers, all of it online.

    Args:
        project: its Compose project.
        seconds_to_online: from ``docker compose up`` with built images to 20 healthy SuperNodes.
    """

    project: ComposeProject
    seconds_to_online: float


def until(what: Callable[[], bool], deadline_s: float, message: Callable[[], str]) -> float:
    """Seconds until ``what`` was observed; at the deadline it fails with ``message``."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() - begun < deadline_s, message()
        time.sleep(0.5)
    return time.monotonic() - begun
