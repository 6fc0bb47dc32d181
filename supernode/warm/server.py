"""The warm process: accept, fork, reap, and nothing else.

It stays single-threaded and never reads from a launcher itself, so no launcher can hold it up and
no message can break it. It answers a connection twice: the child it forked says that it has taken
over, and this process says how that child ended. A launcher that goes away takes its child along.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from . import child
from .preload import IMPORTS, ModelSource, preload

log = logging.getLogger("supernode.warm")

_BACKLOG = 128


@dataclass
class _Running:
    connection: socket.socket
    started: float


class WarmServer:
    """Forks one child per connection.

    Args:
        path: where the socket is to be; its folder is created, mode 0700.
        cold: what its children are to be like.
        idle: seconds without a message after which it ends; None: it never does.
        lock: what it holds while it lives, and its children must not.
    """

    def __init__(
        self,
        path: Path,
        cold: child.Cold,
        idle: float | None = None,
        lock: IO[str] | None = None,
    ) -> None:
        self._path, self._cold, self._idle, self._lock = path, cold, idle, lock
        self._running: dict[int, _Running] = {}  # by process id
        self._pids: dict[int, int] = {}  # by the connection's descriptor, while it is watched
        self._stopping = False
        self._epoll = select.epoll()
        # Signals wake the loop up through this pair.
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)

    def serve(self) -> None:
        """Serve until SIGTERM, SIGINT or idle. Children that are at work then go on."""
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        # Not before it can be stopped in order: whoever finds the socket may want that at once.
        self._listener = listen(self._path)
        socket_file = self._path.stat().st_ino
        self._epoll.register(self._listener.fileno(), select.EPOLLIN)
        self._epoll.register(self._woken.fileno(), select.EPOLLIN)
        while not self._stopping:
            events = self._epoll.poll(self._idle)
            if self._idle is not None and not events and not self._running:
                log.info("no message for %.0f s: ending", self._idle)
                break
            for descriptor, _ in events:
                if descriptor == self._listener.fileno():
                    self._accept()
                elif descriptor == self._woken.fileno():
                    _drain(self._woken)
                else:
                    self._hung_up(descriptor)
            self._reap()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == socket_file:  # not a successor's
                self._path.unlink()

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._forget_in_child()
            child.run(connection, self._cold)
        self._running[pid] = _Running(connection, time.monotonic())
        self._pids[connection.fileno()] = pid
        # Only its end is of interest: what the launcher writes is for the child to read.
        self._epoll.register(connection.fileno(), select.EPOLLRDHUP)

    def _forget_in_child(self) -> None:
        for other in self._running.values():
            other.connection.close()
        if self._lock is not None:
            self._lock.close()
        self._epoll.close()
        for own in (self._listener, self._woken, self._wake):
            own.close()

    def _hung_up(self, descriptor: int) -> None:
        """The launcher went away: its child goes too."""
        pid = self._pids.pop(descriptor, None)
        if pid is not None:
            self._epoll.unregister(descriptor)
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._running:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            running = self._running.pop(pid, None)
            if running is None:
                continue
            status = os.waitstatus_to_exitcode(wait_status)
            # Closing would not do: until every fork in between has closed its copy too, the epoll
            # would go on reporting this descriptor, which by then may be another launcher's.
            if self._pids.pop(running.connection.fileno(), None) is not None:
                self._epoll.unregister(running.connection.fileno())
            with contextlib.suppress(OSError):  # there may be nobody to be told
                running.connection.setblocking(False)
                running.connection.sendall(json.dumps({"status": status}).encode() + b"\n")
            running.connection.close()
            seconds = time.monotonic() - running.started
            log.info("%d ended with %d after %.1f s", pid, status, seconds)


def _drain(end: socket.socket) -> None:
    try:
        while end.recv(4096):
            pass
    except BlockingIOError:
        pass


def listen(path: Path) -> socket.socket:
    """A listening Unix socket, mode 0600, in place of whatever is at ``path``."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        listener.bind(str(fresh))
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    fresh.replace(path)  # only now can it be found: it is there if and only if it answers
    return listener


def cold_search_path() -> list[str]:
    """``sys.path`` as a fresh interpreter has it, without the folder it was started from."""
    answer = subprocess.run(
        [sys.executable, "-I", "-c", "import json, sys; print(json.dumps(sys.path))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [str(part) for part in json.loads(answer.stdout)]


def run(
    path: Path,
    models: list[ModelSource],
    imports: tuple[str, ...] = IMPORTS,
    idle: float | None = None,
    lock: IO[str] | None = None,
) -> None:
    """Warm up and serve until told to stop, or for ``idle`` seconds without a message.

    Args:
        path: the socket.
        models: base models to have ready.
        imports: what to import.
        idle: seconds; None: for ever.
        lock: see ``WarmServer``.

    Raises:
        SuperNodeError: the process is not fit for forking.
    """
    started = time.monotonic()
    search_path = cold_search_path()
    preload(imports, models)
    cold = child.Cold(Path(sys.executable).parent, search_path, child.foreign_modules())
    server = WarmServer(path, cold, idle, lock)
    log.info("ready after %.1f s at %s", time.monotonic() - started, path)
    server.serve()
