"""SuperExec, which starts ServerApps and ClientApps, as a thread of the process it serves."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from importlib import import_module
from logging import ERROR
from typing import Any

from .digests import replace

MODULE = "flwr.supercore.superexec.run_superexec"
# 1.42.0 passes no tracing header on to the process that it starts.
PINS = {"run_superexec": {"1.41.0": "d11f4e7fbc8f0b12", "1.42.0": "91e7a33c5b898f33"}}


def install(clock: object) -> None:
    """Have SuperExec wait by ``clock``, and take no signals: its process has its own handlers.

    Args:
        clock: stands in for the module ``time``, of which SuperExec uses ``sleep`` alone.
    """
    replace(MODULE, "time", clock)
    # Python refuses signal handlers outside the main thread.
    replace(MODULE, "register_signal_handlers", lambda **_settings: None)


def start(**arguments: Any) -> None:
    """Run SuperExec in a thread. If it ends, so does the process: it would accept and never work.

    Args:
        arguments: of Flower's ``run_superexec``.
    """
    threading.Thread(target=_run, args=(arguments,), name="superexec", daemon=True).start()


def _run(arguments: dict[str, Any]) -> None:
    from flwr.common import log

    try:
        import_module(MODULE).run_superexec(**arguments)
    except BaseException as error:  # noqa: BLE001  (SystemExit too: it ends only this thread)
        log(ERROR, "SuperExec ended, so this process stops: %r", error)
    os.kill(os.getpid(), signal.SIGTERM)


def how_it_ended(status: int) -> str:
    """What the ``Popen.returncode`` of a process that it started means, in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def secret_arguments() -> list[str]:
    """Arguments by which Flower's program takes tasks to be given to this process's SuperExec only.

    The secret is fresh, in memory, readable as a file by this process and never on a disk.
    """
    descriptor = os.memfd_create("superexec-secret", os.MFD_CLOEXEC)
    os.write(descriptor, secrets.token_bytes(32))
    file = f"/proc/self/fd/{descriptor}"
    return ["--isolation", "process", "--superexec-auth-secret-file", file]
