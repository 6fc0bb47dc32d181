"""What a forked child does before it is a ``flwr-clientapp`` like any other."""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import json
import logging
import os
import random
import signal
import socket
import struct
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

# Imported before the fork: a child finds what is installed, and not this repository.
from compat.clientapp import run_clientapp

PROGRAM = "flwr-clientapp"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD)


@dataclass(frozen=True)
class Request:
    """What a launcher handed over.

    Args:
        arguments: of the command, without its name.
        environment: the whole environment.
        folder: the working folder.
        umask: for new files.
        streams: open descriptors of standard input, output and error.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    umask: int
    streams: tuple[int, int, int]


@dataclass(frozen=True)
class Cold:
    """What a ``flwr-clientapp`` is like that was started cold on this machine.

    Args:
        programs: the folder it is in.
        search_path: its ``sys.path``, without that folder and without PYTHONPATH.
        foreign: modules of the warm process that it would not have.
    """

    programs: Path
    search_path: list[str]
    foreign: list[str]


def read_request(connection: socket.socket) -> Request:
    """Read one launcher's request.

    Raises:
        ValueError: it is not one, or it comes from another user.
    """
    _, user, _ = struct.unpack(
        "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    if user != os.getuid():
        raise ValueError(f"expected a launcher of user {os.getuid()}, found one of {user}")
    streams = array.array("i")
    header, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * streams.itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            streams.frombytes(data[: len(data) - len(data) % streams.itemsize])
    if len(header) != 4 or len(streams) != 3:
        raise ValueError("expected a length and three streams")
    fields = json.loads(_exactly(connection, struct.unpack("!I", header)[0]))
    return Request(
        arguments=list(fields["arguments"]),
        environment=dict(fields["environment"]),
        folder=str(fields["folder"]),
        umask=int(fields["umask"]),
        streams=(streams[0], streams[1], streams[2]),
    )


def _exactly(connection: socket.socket, length: int) -> str:
    body = b""
    while len(body) < length:
        part = connection.recv(length - len(body))
        if not part:
            raise ValueError(f"expected {length} bytes, found {len(body)}")
        body += part
    return body.decode("utf-8", "surrogateescape")


def run(connection: socket.socket, cold: Cold) -> None:
    """Be the ClientApp that ``connection`` asks for. Does not return.

    Args:
        connection: to the launcher; answered with ``{"pid": ...}`` or ``{"refused": ...}``.
        cold: what to be like.
    """
    status = 1
    try:
        try:
            connection.settimeout(10.0)
            request = read_request(connection)
            become(request, cold)
            answer = json.dumps({"pid": os.getpid()}).encode() + b"\n"
        except (OSError, ValueError, KeyError, TypeError) as error:
            connection.sendall(json.dumps({"refused": repr(error)}).encode() + b"\n")
            return
        connection.sendall(answer)
        connection.close()
        status = _exit_status_of_clientapp()
    finally:
        os._exit(status)


def become(request: Request, cold: Cold) -> None:
    """Take over everything in which a fork differs from a program that was just started."""
    os.setpgid(0, 0)  # a signal to the warm process's group is not meant for this one
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    for standard, stream in enumerate(request.streams):
        os.dup2(stream, standard)
    for stream in request.streams:
        os.close(stream)
    os.environ.clear()
    os.environ.update(request.environment)
    os.umask(request.umask)
    os.chdir(request.folder)

    extra = [part for part in request.environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [str(cold.programs), *extra, *cold.search_path]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    sys.argv = [str(cold.programs / PROGRAM), *request.arguments]
    for name in cold.foreign:
        sys.modules.pop(name, None)
    main = ModuleType("__main__")
    main.__file__ = sys.argv[0]
    sys.modules["__main__"] = main

    # What libraries registered so far is about the warm process, which is not ending.
    atexit._clear()
    atexit.register(logging.shutdown)
    _fresh_randomness()
    _threads(request.environment)
    gc.enable()


def foreign_modules() -> list[str]:
    """What is imported and is not an installed library, by name.

    An app may have modules of the same names as this repository's, or as others that the warm
    process came across, and must get its own.
    """
    prefixes = {sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)}
    installed = tuple(prefix + os.sep for prefix in prefixes)
    places = {name: _place(module) for name, module in sys.modules.items()}
    return [name for name, place in places.items() if place and not place.startswith(installed)]


def _place(module: ModuleType) -> str | None:
    """Where a module was loaded from; ``None`` for one that is in no file."""
    file = getattr(module, "__file__", None)
    if isinstance(file, str):
        return file if Path(file).is_absolute() else None  # torch.ops says "_ops.py"
    locations = getattr(getattr(module, "__spec__", None), "submodule_search_locations", None)
    return str(next(iter(locations))) if locations else None


def _fresh_randomness() -> None:
    random.seed()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        # Not torch.seed(): that also seeds CUDA, lazily but for every device.
        torch.default_generator.manual_seed(int.from_bytes(os.urandom(8), "big") >> 1)


def _threads(environment: dict[str, str]) -> None:
    """As many threads as torch would use after a cold start here."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    wanted = environment.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(int(wanted) if wanted.isdigit() and int(wanted) else _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _exit_status_of_clientapp() -> int:
    """Run Flower's ``flwr-clientapp`` as a program would; the status it ends with.

    The interpreter is not torn down module by module: that would copy pages for nothing.
    """
    status = 0
    try:
        run_clientapp()
    except SystemExit as end:
        if isinstance(end.code, int):
            status = end.code
        elif end.code is not None:
            print(end.code, file=sys.stderr)
            status = 1
    except BaseException:  # noqa: BLE001  (the interpreter's own last resort)
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status & 0xFF
