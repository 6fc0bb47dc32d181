"""Flower's simulation, run by a SuperLink of our own for as long as it is needed.

``flwr run . local-simulation`` does the same through a SuperLink that Flower leaves running on a
fixed port; this one has a free port, a Flower home of its own, and is gone at the end.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from common.errors import MedfedError
from medfed.paths import Home
from medfed.processes import end_trees, last_line

_START_S = 60.0
_POLL_S = 0.25


class SimulationError(MedfedError):
    """A simulation could not be started."""


@contextlib.contextmanager
def simulation(home: Home) -> Iterator[str]:
    """Run a simulating SuperLink whose runs go to ``home``; its address, without TLS.

    Raises:
        SimulationError: it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="medfed-simulation-") as folder:
        port = _free_port()
        log = Path(folder) / "superlink.log"
        command = ["flower-superlink", "--simulation", "--insecure", "--port", str(port)]
        command.append("--disable-runtime-dependency-installation")
        environment = {
            **os.environ,
            "MEDFED_HOME": str(home.root),
            "FLWR_HOME": folder,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }
        with log.open("wb") as output:
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until_it_listens(child, port, log)
            yield f"127.0.0.1:{port}"
        finally:
            _end(child)


def _wait_until_it_listens(child: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if child.poll() is not None or time.monotonic() > end:
            raise SimulationError(
                f"expected a SuperLink for simulations on port {port} within {_START_S:.0f} s, "
                f"found: {last_line(log)}",
                "is another program using the port, or the machine very busy?",
            )
        time.sleep(_POLL_S)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the SuperLink, the ServerApp and every Ray process that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        end_trees([psutil.Process(child.pid)])
    child.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
