"""The federation as processes on this machine: one SuperLink and its SuperNodes on 127.0.0.1.

The same entrypoints, TLS, keys and partitions as in containers. ``federation.json`` holds what was
started, each process by pid and creation time, so that ``down`` ends these and no others.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import certs
from common import files
from common.errors import MedfedError
from embedded import model as embedded_model
from medfed.paths import Home
from superlink import health
from superlink.preflight import check_port_is_free
from supernode.preflight import check_partition_folder
from supernode.roster import DEFAULT_ROSTER, Roster, SuperNodeEntry
from supernode.warm import supervisor

if TYPE_CHECKING:
    from rich.console import Console

    from superlink.control import Node

HOST = "127.0.0.1"
SUPERLINK = "superlink"
WARM = "warm"
_SUPERLINK_DEADLINE_S = 60.0
_STOP_S = 15.0
_POLL_S = 0.25
# `python -m superlink` finds its package here whether or not the project is installed.
_CODE = Path(__file__).resolve().parents[1]
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

Progress = Callable[[str, int, int], None]


class FederationError(MedfedError):
    """The process federation cannot be started, or is not what it should be."""


@dataclass(frozen=True)
class Process:
    """One process that ``up`` started.

    Args:
        name: "superlink" or the SuperNode's name.
        pid: its process id.
        created: its creation time in seconds since the epoch: a pid alone is used again.
        port: the SuperLink's port, or the SuperNode's port for its ClientApps.
        log: where its output goes.
    """

    name: str
    pid: int
    created: float
    port: int
    log: str

    def find(self) -> psutil.Process | None:
        """The process if it still is the one that was started."""
        try:
            process = psutil.Process(self.pid)
            # The clock's resolution is 10 ms; two processes of one pid are further apart.
            if abs(process.create_time() - self.created) > 0.05:
                return None
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except psutil.NoSuchProcess:
            return None


@dataclass(frozen=True)
class Federation:
    """What ``up`` started, as ``federation.json`` holds it.

    Args:
        port: the SuperLink's port.
        superlink: the SuperLink.
        supernodes: the SuperNodes, in the roster's order.
    """

    port: int
    superlink: Process
    supernodes: tuple[Process, ...]
    warm: Process | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the SuperLink."""
        return f"{HOST}:{self.port}"

    @property
    def processes(self) -> tuple[Process, ...]:
        """All of them, the SuperLink first."""
        warm = () if self.warm is None else (self.warm,)
        return (self.superlink, *warm, *self.supernodes)


@dataclass(frozen=True)
class Status:
    """One process as ``medfed status`` shows it.

    Args:
        name: "superlink", "warm" (ClientApps are forked from it) or the SuperNode's name.
        pid: its process id.
        alive: whether the process runs.
        online: whether it answers, or, for a SuperNode, whether the SuperLink sees it.
        pss: bytes of memory of it and its children, shared pages divided; None if not visible.
        last_seen: last heartbeat at the SuperLink, UTC; None for the SuperLink itself.
        log: where its output goes.
        gate: whether it was started with a site gate; None for what is no SuperNode.
    """

    name: str
    pid: int
    alive: bool
    online: bool
    pss: int | None
    last_seen: datetime | None
    log: str
    gate: bool | None


@dataclass(frozen=True)
class Up:
    """What one call of ``up`` did.

    Args:
        federation: what runs now.
        started: the names of what this call started; empty if everything ran already.
        actions: what was issued under ``certs/``, one line each.
        seconds: how long it took.
    """

    federation: Federation
    started: tuple[str, ...]
    actions: tuple[str, ...]
    seconds: float


def load(home: Home) -> Federation | None:
    """What is recorded; None if nothing is.

    Raises:
        FederationError: the record is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(home.federation.read_text(encoding="utf-8"))
        return Federation(
            port=int(content["port"]),
            superlink=Process(**content["superlink"]),
            supernodes=tuple(Process(**entry) for entry in content["supernodes"]),
            warm=Process(**content["warm"]) if content.get("warm") else None,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FederationError(
            f"expected the record of a federation in {home.federation}, found: {error}",
            "end its processes by hand (ps), then delete the file",
        ) from None


def up(
    home: Home,
    roster: Roster,
    *,
    count: int | None = None,
    port: int = 8000,
    deadline_s: float = 180.0,
    use_gpu: bool = False,
    roster_path: Path = DEFAULT_ROSTER,
    fleet: str | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Up:
    """Bring the federation up and return once all its SuperNodes are online.

    What runs already is left alone; what is missing is started. If anything goes wrong, what this
    call started is ended again.

    Args:
        home: where certificates, partitions, state and logs are.
        roster: the SuperNodes.
        count: only the first so many of the roster; None: those of the running federation, or all.
        port: the SuperLink's port.
        deadline_s: seconds for all SuperNodes to come online.
        use_gpu: give each SuperNode the roster's slice of a GPU.
        roster_path: where ``roster`` was read from.
        fleet: ``HOST:PORT`` of a gateway to send the SuperNodes to; None: the SuperLink itself.
        progress: called with what is being done, how much of it is done, and of how much.

    Raises:
        FederationError: or an error of the rooms it calls; each has a ``hint``.
    """
    begin = time.monotonic()
    home.root.mkdir(parents=True, exist_ok=True)
    with _only_one(home):
        running, recorded = _still_running(home, port)
        if count is None and recorded is not None:
            count = len(recorded.supernodes)
        out = certs.revoked_names(home.certs)
        entries = tuple(entry for entry in _first(roster, count) if entry.name not in out)
        names = {entry.name for entry in entries}
        if running and not names.issuperset(one.name for one in running.supernodes):
            raise FederationError(
                f"expected {len(entries)} SuperNodes, found "
                f"{len(running.supernodes)} running, some of them others",
                "`medfed down` first",
            )
        for entry in entries:
            check_partition_folder(home.partitions / entry.name)
        issued = certs.issue(home.certs, [entry.name for entry in entries])
        start = _Start(home, roster_path, port, fleet or f"{HOST}:{port}", use_gpu)
        started: list[Process] = []
        try:
            superlink = running.superlink if running else None
            if superlink is None:
                check_port_is_free(HOST, port)
                superlink = start.superlink([entry.name for entry in entries])
                started.append(superlink)
                _save(home, Federation(port, superlink, ()))
                _wait_for_superlink(home, superlink, progress)
            warm = running.warm if running else None
            if warm is None:
                warm = start.warm()
                started.append(warm)
            federation = Federation(port, superlink, running.supernodes if running else (), warm)
            federation, new = _start_supernodes(home, federation, entries, start, started, progress)
            _wait_online(home, federation, deadline_s, progress)
            _wait_until_warm(home, warm, deadline_s, progress)
        except BaseException:
            _end(list(reversed(started)))
            if running is not None and recorded is not None:
                _save(home, recorded)
            else:
                home.federation.unlink(missing_ok=True)
            raise
    return Up(
        federation,
        (*([] if running else [SUPERLINK]), *new),
        issued.actions,
        time.monotonic() - begin,
    )


def down(home: Home, progress: Progress = lambda stage, done, total: None) -> tuple[str, ...]:
    """End what ``up`` started, children included; the names of what still ran.

    SuperNodes go first, so that they can sign off at the SuperLink.

    Raises:
        FederationError: the record is damaged.
    """
    if not home.root.is_dir():
        return ()
    with _only_one(home):
        federation = load(home)
        if federation is None:
            return ()
        alive = [process for process in federation.processes if process.find() is not None]
        progress("stopping", 0, len(alive))
        _end([process for process in alive if process.name != SUPERLINK])
        _end([process for process in alive if process.name == SUPERLINK])
        progress("stopping", len(alive), len(alive))
        home.federation.unlink(missing_ok=True)
        return tuple(process.name for process in alive)


@contextlib.contextmanager
def federation(home: Home, console: Console | None = None) -> Iterator[str]:
    """The whole roster's federation for the length of a ``with`` statement; gives its address.

    One that runs already is used and left running; one that this call started is ended.

    Raises:
        FederationError: or an error of the rooms it calls; each has a ``hint``.
    """
    from medfed.progress import live_progress
    from supernode import roster

    running = load(home)
    with live_progress(console) as progress:
        done = up(
            home,
            roster.load(),
            port=8000 if running is None else running.port,
            progress=progress,
        )
    try:
        yield done.federation.address
    finally:
        if SUPERLINK in done.started:
            with live_progress(console) as progress:
                down(home, progress)


def status(home: Home) -> list[Status]:
    """Each process of the federation, the SuperLink first; empty if none is recorded.

    Raises:
        FederationError: the record is damaged.
    """
    federation = load(home)
    if federation is None:
        return []
    from superlink.control import Control

    answers = health.problem(HOST, federation.port, home.certs / "ca.crt") is None
    nodes: dict[str, Node] = {}
    if answers:
        with Control(federation.address, home.certs / "ca.crt") as control:
            nodes = {node.name: node for node in control.nodes()}
    found = []
    for process in federation.processes:
        running = process.find()
        node = nodes.get(process.name)
        found.append(
            Status(
                name=process.name,
                pid=process.pid,
                alive=running is not None,
                online=_is_online(process, answers, node, home),
                pss=None if running is None else _pss(running),
                last_seen=node.last_seen if node else None,
                log=process.log,
                gate=_has_gate(process, running),
            )
        )
    return found


def _has_gate(process: Process, running: psutil.Process | None) -> bool | None:
    if process.name in {SUPERLINK, WARM} or running is None:
        return None
    try:
        return "--site" in running.cmdline()
    except psutil.Error:  # it has just ended
        return None


def _is_online(process: Process, superlink_answers: bool, node: Node | None, home: Home) -> bool:
    if process.name == SUPERLINK:
        return superlink_answers
    if process.name == WARM:
        return supervisor.is_ready(_warm_socket(home))
    return node is not None and node.online


@contextlib.contextmanager
def _only_one(home: Home) -> Iterator[None]:
    """Hold a lock: two ``up`` at a time would both start everything."""
    with (home.root / "federation.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FederationError(
                f"expected to be the only one at {home.root}, found another `medfed up` or "
                "`medfed down` at work",
                "wait for it to end",
            ) from None
        yield


def _first(roster: Roster, count: int | None) -> tuple[SuperNodeEntry, ...]:
    total = len(roster.supernodes)
    if count is not None and not 1 <= count <= total:
        raise FederationError(
            f"expected 1 to {total} SuperNodes, found {count}",
            "the roster (supernode/roster.toml) says how many there are",
        )
    return roster.supernodes[:count]


def _still_running(home: Home, port: int) -> tuple[Federation | None, Federation | None]:
    """What still runs of the recorded federation, and the whole of it.

    SuperNodes that have lost their SuperLink for good are ended: a new one would be another's.
    """
    federation = load(home)
    if federation is None:
        return None, None
    alive = tuple(process for process in federation.supernodes if process.find() is not None)
    warm = federation.warm if federation.warm and federation.warm.find() else None
    if federation.superlink.find() is None:
        _end(alive if warm is None else (*alive, warm))
        home.federation.unlink(missing_ok=True)
        return None, federation
    if federation.port != port:
        raise FederationError(
            f"expected the SuperLink on port {port}, found it running on port {federation.port}",
            "`medfed down` first",
        )
    return replace(federation, supernodes=alive, warm=warm), federation


class _Start:
    """Starts processes that outlive this one, each with its own log and Flower home."""

    def __init__(self, home: Home, roster: Path, port: int, fleet: str, use_gpu: bool) -> None:
        self._home = home
        self._roster = roster
        self._port = port
        self._fleet = fleet
        self._use_gpu = use_gpu

    def superlink(self, institutions: Sequence[str]) -> Process:
        folder, pki = self._home.superlink, self._home.certs
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            *("superlink", "--host", HOST, "--port", str(self._port)),
            *("--certificate", str(pki / "superlink.crt"), "--key", str(pki / "superlink.key")),
            *("--ca", str(pki / "ca.crt"), "--database", str(folder / "state.db")),
        ]
        variables = {
            "FLWR_HOME": str(folder / "flwr"),
            "MEDFED_INSTITUTIONS": ",".join(institutions),
        }
        log = folder / "superlink.log"
        return self._start(SUPERLINK, command, variables, log, self._port)

    def supernode(self, entry: SuperNodeEntry, runtime_port: int) -> Process:
        folder, pki = self._home.supernodes / entry.name, self._home.certs
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            *("supernode", "--name", entry.name, "--superlink", self._fleet),
            *("--ca", str(pki / "ca.crt")),
            *("--key", str(pki / "supernodes" / f"{entry.name}.key")),
            *("--data", str(self._home.partitions / entry.name)),
            *("--roster", str(self._roster), "--runtime-port", str(runtime_port)),
            *(["--gpu"] if self._use_gpu else []),
            *(["--site", str(site)] if (site := self._home.sites / entry.name).is_dir() else []),
        ]
        variables = {
            "FLWR_HOME": str(folder / "flwr"),
            "MEDFED_WARM_SOCKET": str(_warm_socket(self._home)),
        }
        return self._start(entry.name, command, variables, folder / "supernode.log", runtime_port)

    def warm(self) -> Process:
        """Start the one warm process that serves all SuperNodes of this machine."""
        folder = self._home.supernodes
        folder.mkdir(parents=True, exist_ok=True)
        command = ["supernode.warm", "serve", "--socket", str(_warm_socket(self._home))]
        if (self._home.models / embedded_model.NAME).is_dir():
            for bits in (0, 4):  # plain, and as the default run config asks for it
                command += ["--model", f"local/{embedded_model.NAME}@{bits}"]
        return self._start(WARM, command, {}, folder / "warm.log", 0)

    def _start(
        self, name: str, command: list[str], variables: dict[str, str], log: Path, port: int
    ) -> Process:
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        environment = {
            **os.environ,
            "MEDFED_HOME": str(self._home.root),
            "PYTHONUNBUFFERED": "1",
            **variables,
        }
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=_CODE,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Process(name, child.pid, psutil.Process(child.pid).create_time(), port, str(log))


def _wait_for_superlink(home: Home, process: Process, progress: Progress) -> None:
    def trouble() -> str | None:
        return health.problem(HOST, process.port, home.certs / "ca.crt")

    _wait_ready(process, "starting the SuperLink", _SUPERLINK_DEADLINE_S, trouble, progress)


def _wait_ready(
    process: Process,
    stage: str,
    deadline_s: float,
    trouble: Callable[[], str | None],
    progress: Progress,
) -> None:
    """Wait until ``trouble`` has nothing to say; a process that ends, or the deadline, is one."""
    end = time.monotonic() + deadline_s
    progress(stage, 0, 1)
    while (found := trouble()) is not None:
        _must_run(process)
        if time.monotonic() >= end:
            raise FederationError(
                f"expected {process.name} to be ready within {deadline_s:.0f} s, found: {found}",
                f"its log: {process.log}",
            )
        time.sleep(_POLL_S)
    progress(stage, 1, 1)


def _start_supernodes(
    home: Home,
    federation: Federation,
    entries: Sequence[SuperNodeEntry],
    start: _Start,
    started: list[Process],
    progress: Progress,
) -> tuple[Federation, tuple[str, ...]]:
    """Register all of ``entries`` and start those that do not run; the federation, the new."""
    from superlink.control import Control

    public_keys = {entry.name: home.certs / "supernodes" / f"{entry.name}.pub" for entry in entries}
    progress("registering SuperNodes", 0, len(entries))
    with Control(federation.address, home.certs / "ca.crt") as control:
        control.unregister(one.public_key.encode() for one in certs.revocations(home.certs))
        control.register(public_keys)
    progress("registering SuperNodes", len(entries), len(entries))
    running = {process.name: process for process in federation.supernodes}
    ports = _free_ports(federation.port + 1, {process.port for process in running.values()})
    new = []
    for entry in entries:
        if entry.name not in running:
            running[entry.name] = start.supernode(entry, next(ports))
            started.append(running[entry.name])
            new.append(entry.name)
    federation = replace(federation, supernodes=tuple(running[entry.name] for entry in entries))
    _save(home, federation)
    return federation, tuple(new)


def _wait_online(home: Home, federation: Federation, deadline_s: float, progress: Progress) -> None:
    """Wait for all SuperNodes; a process that ends, or the deadline, is an error with its log."""
    from common.errors import SuperLinkError
    from superlink.control import Control

    processes = {process.name: process for process in federation.supernodes}
    online: set[str] = set()

    def look(nodes: list[Node]) -> None:
        online.clear()
        online.update(node.name for node in nodes)
        progress("SuperNodes online", len(online), len(processes))
        for process in federation.processes:
            _must_run(process)

    with Control(federation.address, home.certs / "ca.crt") as control:
        try:
            control.wait_online(list(processes), deadline_s, look)
        except SuperLinkError as error:
            missing = [name for name in processes if name not in online]
            raise FederationError(
                str(error),
                "; ".join(f"{name}: {last_line(Path(processes[name].log))}" for name in missing),
            ) from None


def _wait_until_warm(home: Home, warm: Process, deadline_s: float, progress: Progress) -> None:
    """Wait until ClientApps can be forked; without it each message would start cold."""

    def trouble() -> str | None:
        return None if supervisor.is_ready(_warm_socket(home)) else last_line(Path(warm.log))

    _wait_ready(warm, "warming ClientApps", deadline_s, trouble, progress)


def _warm_socket(home: Home) -> Path:
    return home.supernodes / "warm.socket"


def _must_run(process: Process) -> None:
    if process.find() is None:
        raise FederationError(
            f"expected {process.name} to run, found that it ended: {last_line(Path(process.log))}",
            f"its log: {process.log}",
        )


def last_line(log: Path) -> str:
    """The line of a log that says most about its end: the last error, else the last line."""
    try:
        text = _COLOURS.sub("", log.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "no log"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["its log is empty"])[-1]


def _free_ports(first: int, taken: set[int]) -> Iterator[int]:
    """Ports from ``first`` upwards on which nothing listens: the same ones on every quiet start."""
    for port in range(first, 65536):
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        yield port
    raise FederationError(
        f"expected a free port above {first}, found none", "choose a lower --port"
    )


def _end(processes: Sequence[Process]) -> None:
    end_trees([root for process in processes if (root := process.find()) is not None])


def end_trees(roots: Sequence[psutil.Process]) -> None:
    """End processes and all their children: first kindly, then, after a while, surely."""
    tree: dict[int, psutil.Process] = {}
    for root in roots:
        tree[root.pid] = root
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in root.children(recursive=True):
                tree[child.pid] = child
    # Each is told itself: Flower's children look only now and then whether their parent is there.
    for one in tree.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            one.terminate()
    _, left = psutil.wait_procs(list(tree.values()), timeout=_STOP_S)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(left, timeout=_STOP_S)


def _pss(root: psutil.Process) -> int | None:
    total = 0
    try:
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += int(process.memory_full_info().pss)
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        return None
    return total


def _save(home: Home, federation: Federation) -> None:
    """Write the record: whole, or not at all."""
    files.write(home.federation, json.dumps(asdict(federation), indent=2).encode(), files.PRIVATE)
