"""Keep a warm process alive: start it, start it again when it dies, and say whether it answers."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from common.retry import RetryPolicy

log = logging.getLogger("supernode.warm")

STEADY_S = 60.0


RESTARTS = RetryPolicy(first_s=1.0, longest_s=60.0)


def is_ready(path: Path) -> bool:
    """Whether a warm process listens at ``path``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5.0)
        try:
            connection.connect(str(path))
        except OSError:
            return False
        return True


def wait_until_ready(path: Path, timeout: float) -> bool:
    """Wait for a warm process to listen at ``path``, at most ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while not (ready := is_ready(path)) and time.monotonic() < end:
        time.sleep(0.1)
    return ready


class Supervisor:
    """Runs one command for as long as it is not stopped.

    Args:
        command: what to run.
        steady: seconds after which a process that ends did not fail at its start.
        waits: seconds between starts, for those that do.
    """

    def __init__(
        self,
        command: list[str],
        *,
        steady: float = STEADY_S,
        waits: Callable[[], Iterator[float]] = RESTARTS.waits,
    ) -> None:
        self._command, self._steady, self._waits = command, steady, waits
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Start the command again and again until :meth:`stop`."""
        waits = self._waits()
        while True:
            started = time.monotonic()
            with self._lock:
                if self._stop.is_set():
                    return
                self._process = subprocess.Popen(self._command)
            status = self._process.wait()
            if self._stop.is_set():
                return
            if time.monotonic() - started >= self._steady:
                waits = self._waits()
            wait = next(waits)
            log.warning(
                "the warm process ended with %d: messages start cold, next try in %.0f s",
                status,
                wait,
            )
            self._stop.wait(wait)

    def stop(self) -> None:
        """End the command and do not start it again."""
        self._stop.set()
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()


def supervise(path: Path, arguments: list[str]) -> None:
    """Keep ``python -m supernode.warm once`` alive until SIGTERM or SIGINT.

    Args:
        path: its socket.
        arguments: its further arguments.
    """
    command = [sys.executable, "-m", "supernode.warm", "once", "--socket", str(path), *arguments]
    supervisor = Supervisor(command)

    def handle(_number: int, _frame: FrameType | None) -> None:
        # Not in the handler itself: the main thread may be holding the lock.
        threading.Thread(target=supervisor.stop).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)
    supervisor.run()
