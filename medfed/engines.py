"""The three places in which the same app runs: simulated, as processes, in containers.

Each engine runs one config from beginning to end in surroundings of its own and leaves the run's
record behind. Models, datasets and partitions are those of the user's home; nothing else is shared.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from compat.fab import build_fab_from_disk
from medfed import composed, processes
from medfed.paths import Home
from medfed.processes import FederationError
from medfed.runs import PROJECT, RunConfig, RunError, run
from medfed.simulation import simulation
from superlink.control import Control
from supernode import roster
from supernode.roster import DEFAULT_ROSTER

_POLL_S = 1.0

Engine = Callable[[Home, RunConfig, Path, Console], None]


def simulated(home: Home, config: RunConfig, keep: Path, console: Console) -> None:
    """Run ``config`` in Flower's simulation; its record goes to the folder ``keep``."""
    with _scratch(home) as scratch, simulation(scratch) as address, Control(address) as control:
        nodes = roster.load().num_partitions
        shutil.copytree(run(control, scratch, config, console, simulate=nodes).folder, keep)


def as_processes(
    home: Home,
    config: RunConfig,
    keep: Path,
    console: Console,
    *,
    roster_path: Path = DEFAULT_ROSTER,
) -> None:
    """Run ``config`` on a process federation of its own; its record goes to the folder ``keep``."""
    from medfed.progress import live_progress

    with _scratch(home) as scratch:
        try:
            with live_progress(console) as progress:
                up = processes.up(
                    scratch,
                    roster.load(roster_path),
                    port=_free_port(),
                    roster_path=roster_path,
                    progress=progress,
                )
            with Control(up.federation.address, scratch.certs / "ca.crt") as control:
                shutil.copytree(run(control, scratch, config, console).folder, keep)
        finally:
            processes.down(scratch)


def in_containers(home: Home, config: RunConfig, keep: Path, console: Console) -> None:
    """Run ``config`` on the Compose federation that is up; its record goes to ``keep``.

    Raises:
        ComposeError: it is not up.
        RunError: the run failed.
    """
    del home  # the containers have volumes of their own
    with tempfile.TemporaryDirectory() as folder:
        ca = Path(folder) / "ca.crt"
        composed.fetch_ca(PROJECT, ca)
        with Control(composed.published_address(PROJECT), ca) as control:
            run_id = control.start_run(build_fab_from_disk(PROJECT), config)
            with console.status(f"run {run_id} in containers"):
                while not (found := control.run(run_id)).finished:
                    time.sleep(_POLL_S)
        composed.fetch_run(PROJECT, run_id, keep)
    if not (keep / "summary.json").is_file():
        raise RunError(
            f"run {run_id} did not finish: {found.details or found.status}",
            "docker compose logs superlink",
        )


ENGINES: dict[str, Engine] = {
    "simulation": simulated,
    "processes": as_processes,
    "containers": in_containers,
}


@contextlib.contextmanager
def _scratch(home: Home) -> Iterator[Home]:
    """A home of its own that sees the user's models, datasets and partitions."""
    with tempfile.TemporaryDirectory(prefix="medfed-") as folder:
        scratch = Home(Path(folder))
        for part in (home.models, home.datasets, home.partitions):
            if part.exists():
                (scratch.root / part.name).symlink_to(part)
        yield scratch


def _free_port() -> int:
    """A port with room above it for the SuperNodes' own.

    Below those that the kernel gives to outgoing connections (32768 and up): it might give one away
    between this look and the moment at which a SuperNode wants it.
    """
    for port in range(20_000, 32_000, 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise FederationError("expected a free port from 20000 to 32000, found none", "end something")
