"""The ``flwr-clientapp`` that SuperExec starts for every message: hand it to the warm process.

Started for each message, so it imports next to nothing and is run as a plain file with
``python -I -S``. It sends its arguments, environment, working folder, umask and standard streams
over a Unix socket; the warm process forks a child that does the work; this process passes signals
on and ends with the child's exit status. When nobody answers on the socket it becomes the stock
``flwr-clientapp`` instead and says so.

Environment: ``MEDFED_WARM_SOCKET``, the warm process's socket; ``MEDFED_WARM_PYTHON``, the
interpreter next to which the stock ``flwr-clientapp`` lies; ``MEDFED_WARM_IDLE_S``, if set, lets a
cold start leave a warm process behind that ends after so many seconds without a message.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
from typing import NoReturn

NAME = "flwr-clientapp"
ANSWER_S = 10.0  # the warm process only has to fork: much less than a cold start takes
_RELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


class Cold(Exception):  # noqa: N818  (not an error: a reason)
    """Why this message gets the stock cold start."""


def main(arguments: list[str]) -> int:
    """Run one ClientApp; the status to exit with."""
    try:
        connection, pid = hand_over(os.environ.get("MEDFED_WARM_SOCKET", ""), arguments)
    except Cold as reason:
        start_cold(arguments, reason)
    return follow(connection, pid)


def hand_over(path: str, arguments: list[str]) -> tuple[socket.socket, int]:
    """Send this process's work to the warm process.

    Returns:
        The connection on which the status will come, and the process that does the work.

    Raises:
        Cold: nobody took the work, so nobody will do it.
    """
    if not path:
        raise Cold("MEDFED_WARM_SOCKET is not set")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        request = {
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": os.getcwd(),  # noqa: PTH109  (pathlib takes longer to import than all this)
            "umask": _umask(),
        }
        body = json.dumps(request).encode()
        connection.settimeout(ANSWER_S)
        connection.connect(path)
        streams = array.array("i", [0, 1, 2])
        header = struct.pack("!I", len(body))
        connection.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams.tobytes())])
        connection.sendall(body)
        answer = receive(connection)
        if "pid" not in answer:
            raise Cold(str(answer.get("refused", "the warm process closed the connection")))
        connection.settimeout(None)
    except (OSError, ValueError) as error:
        connection.close()
        raise Cold(f"{path}: {error}") from error
    except Cold:
        connection.close()
        raise
    return connection, int(str(answer["pid"]))


def receive(connection: socket.socket) -> dict[str, object]:
    """One line of JSON from the warm process; empty when it closed the connection."""
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(1)
        if not part:
            return {}
        line += part
    answer = json.loads(line)
    return answer if isinstance(answer, dict) else {}


def follow(connection: socket.socket, pid: int) -> int:
    """Pass signals on to the process that does the work and wait for its end.

    Returns:
        Its exit status. A process that was killed by a signal takes this one along the same way.
    """
    try:
        process = os.pidfd_open(pid)
    except OSError:  # it has ended already; its status is on the connection
        process = -1

    def relay(number: int, _frame: object) -> None:
        if process >= 0:
            with contextlib.suppress(ProcessLookupError):  # its status is on the connection
                signal.pidfd_send_signal(process, number)

    # Python runs a handler between two of its steps: one that arrives on the way into a blocking
    # call would wait for the call's end. This descriptor is written to at once.
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in _RELAYED:
        signal.signal(number, relay)
    wait_for(connection.fileno(), woken)
    try:
        answer = receive(connection)
    except ConnectionError:
        answer = {}
    status = answer.get("status")
    if isinstance(status, int):
        return end_like(status)
    say(f"{NAME}: the warm process ended; process {pid} goes on and its exit status is unknown")
    if process >= 0:
        wait_for(process, woken)
    return 1


def wait_for(descriptor: int, woken: int) -> None:
    """Return when ``descriptor`` can be read; ``woken`` is what signals are written to."""
    poll = select.poll()
    for one in (descriptor, woken):
        poll.register(one, select.POLLIN)
    while descriptor not in dict(poll.poll()):
        os.read(woken, 64)


def end_like(status: int) -> int:
    """The exit status for ``os.waitstatus_to_exitcode``'s ``status``; a signal is repeated here."""
    if status >= 0:
        return status
    signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else 0
    os.kill(os.getpid(), -status)
    return 128 - status


def start_cold(arguments: list[str], reason: Cold) -> NoReturn:
    """Become the stock ``flwr-clientapp``."""
    python = os.environ.get("MEDFED_WARM_PYTHON") or sys.executable
    program = os.path.join(os.path.dirname(python), NAME)  # noqa: PTH118, PTH120  (see above)
    say(f"{NAME}: cold start, for the warm process did not take this message ({reason})")
    if os.environ.get("MEDFED_WARM_IDLE_S"):
        warm_up(python)
    os.execv(program, [program, *arguments])  # noqa: S606


def warm_up(python: str) -> None:
    """Start a warm process for the messages after this one; it ends by itself when none comes.

    For a machine or container of one SuperNode, which may be asked once in an hour: at rest it
    holds no memory for a ClientApp. Where one is warming up already, the new one gives way.
    """
    here = os.path.abspath(__file__)  # noqa: PTH100  (see above)
    for _ in range(3):
        here = os.path.dirname(here)  # noqa: PTH120
    environment = {**os.environ, "PYTHONPATH": here}
    with contextlib.suppress(OSError):  # then the next message starts cold too
        os.posix_spawn(
            python,
            [python, "-m", "supernode.warm", "once", "--idle", os.environ["MEDFED_WARM_IDLE_S"]],
            environment,
            setsid=True,
        )


def say(line: str) -> None:
    """Write a line to the SuperNode's log."""
    os.write(2, f"{line}\n".encode("utf-8", "replace"))


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
