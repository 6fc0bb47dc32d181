"""What the SuperNode does between two polls, and where its other changes to Flower are put in.

Stock Flower 1.41 sleeps a fixed 3 s between two questions to the SuperLink, 0.5 s between two
looks for the ClientApp's reply, and starts a second process (``flower-superexec``) that asks the
SuperNode once a second whether there is a message to work on. Here

- the SuperLink is asked again at once when it held the last question open until there was news
  (``superlink/longpoll.py``), and at an adaptive pace when it did not;
- the reply is looked for in this process's own memory, every 20 ms while one is due;
- SuperExec's own loop runs in a thread of the SuperNode, which rings a bell when a message has
  arrived: one process less for each SuperNode, no wait, and no polling at rest.

What is touched is listed in ``INTERNALS``: :func:`findings` compares it with the installed Flower,
and anything unexpected leaves the stock behaviour in place and says so in the log. Nothing is
changed before :func:`run_supernode` is called. What outlasts faults is in ``patience``,
``lifeline`` and ``watch``, each with a guard of its own.
"""

from __future__ import annotations

import ast
import inspect
import os
import secrets
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from importlib import metadata
from logging import ERROR, INFO, WARNING
from pathlib import Path
from types import ModuleType
from typing import Any

from . import lifeline, patience, watch
from .wire import Meter, WireLog

FLOWER = "1.41.0"

# Every function whose behaviour the replaced names change, and all that each may do with `time`.
INTERNALS: dict[str, dict[str, list[str]]] = {
    "flwr.supernode.start_client_internal": {
        "start_client_internal": ["time.sleep(3)"],
        "_pull_and_store_message": [],
        "_push_messages": ["time.sleep(0.5)", "time.sleep(0.5)"],
    },
    "flwr.supercore.superexec.run_superexec": {
        "run_superexec": ["time.sleep(task_poll_interval)"],
    },
}
_AT_REST_S = 3.0  # the stock sleep of `start_client_internal`, by which its calls are told apart

WARM_BIN = Path(__file__).parent / "warm" / "bin"


class Pace:
    """How long to wait before the SuperLink is asked again.

    Args:
        quick: seconds between polls until ``moment`` seconds after a message.
        medium: seconds between polls until ``while_`` seconds after a message.
        slow: seconds between polls at rest; what stock Flower does always.
        held: an answer that took this long came from a SuperLink that holds questions open.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        quick: float = 0.25,
        moment: float = 15.0,
        medium: float = 1.0,
        while_: float = 300.0,
        slow: float = _AT_REST_S,
        held: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quick, self._moment = quick, moment
        self._medium, self._while = medium, while_
        self._slow, self._held = slow, held
        self._clock = clock
        self._asked = clock()
        self._message: float | None = None

    def message(self) -> None:
        """A message arrived, or its reply left: more may follow."""
        self._message = self._asked = self._clock()

    def asking(self) -> None:
        """The SuperLink is about to be asked."""
        self._asked = self._clock()

    def wait(self) -> float:
        """Seconds to sleep after an answer without a message."""
        now = self._clock()
        if now - self._asked >= self._held:
            return 0.0
        since = float("inf") if self._message is None else now - self._message
        if since < self._moment:
            return self._quick
        return self._medium if since < self._while else self._slow


class SuperNodeClock:
    """Stands in for the module ``time`` in ``start_client_internal``.

    Args:
        pace: how long to wait for a message.
        bell: set when there is a message to work on.
        reply: seconds between two looks for the ClientApp's reply, in this process's memory.
        ring: seconds after which the bell rings again while the reply is still due.
        sleep: what really sleeps.
    """

    def __init__(
        self,
        pace: Pace,
        bell: threading.Event,
        *,
        reply: float = 0.02,
        ring: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._pace, self._bell, self._reply, self._sleep = pace, bell, reply, sleep
        self._looks_per_ring = max(1, round(ring / reply))
        self._looks = 0

    def message_arrived(self) -> None:
        """There is a message to work on: ring at the next look for its reply."""
        self._looks = 0

    def sleep(self, seconds: float) -> None:
        """Sleep as long as makes sense where stock Flower sleeps ``seconds``."""
        if seconds >= _AT_REST_S:
            self._sleep(self._pace.wait())
            self._pace.asking()
            return
        if self._looks % self._looks_per_ring == 0:
            self._bell.set()
        self._looks += 1
        self._pace.message()
        self._sleep(self._reply)


class SuperExecClock:
    """Stands in for the module ``time`` in ``run_superexec``: it waits for the bell.

    Args:
        bell: set when there may be a task.
        longest: seconds after which it looks without having been called.
    """

    def __init__(self, bell: threading.Event, longest: float = 60.0) -> None:
        self._bell, self._longest = bell, longest

    def sleep(self, seconds: float) -> None:
        """Wait for the bell where stock Flower sleeps ``seconds``."""
        del seconds
        self._bell.wait(self._longest)
        self._bell.clear()


def findings() -> list[str]:
    """What the installed Flower does differently from what this file was written for.

    Returns:
        One line per difference; empty when the adaptive polling may be used.
    """
    installed = metadata.version("flwr")
    if installed != FLOWER:
        return [f"expected flwr {FLOWER}, found {installed}"]
    return [
        difference
        for module, functions in INTERNALS.items()
        for difference in differences(_import(module), functions)
    ]


def differences(module: ModuleType, expected: dict[str, list[str]]) -> list[str]:
    """Compare what functions of ``module`` do with ``time`` with what is expected of them.

    Returns:
        One line per function that is missing or uses ``time`` in another way.
    """
    if getattr(module, "time", None) is not time:
        return [f"expected {module.__name__} to import the module time"]
    found = []
    for name, uses in expected.items():
        function = getattr(module, name, None)
        if not inspect.isfunction(function):
            found.append(f"expected a function {module.__name__}.{name}")
        elif (really := _uses_of_time(function)) != uses:
            found.append(f"expected {uses} in {module.__name__}.{name}, found {really}")
    return found


def _uses_of_time(function: Callable[..., Any]) -> list[str]:
    """Every statement-level use of the name ``time`` in a function, in the order of the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "time":
                calls[id(owner)] = ast.unparse(node)
    return [
        calls.get(id(node), "time")
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "time"
    ]


def _import(name: str) -> ModuleType:
    __import__(name)
    return sys.modules[name]


def _replace(module: ModuleType, name: str, stand_in: object) -> None:
    setattr(module, name, stand_in)


def run_supernode() -> None:
    """Run ``flower-supernode`` on ``sys.argv``, adaptively where the installed Flower allows it.

    Its ClientApps are forked from the warm process when ``MEDFED_WARM_SOCKET`` names one.
    """
    from flwr.supercore import log
    from flwr.supernode.cli import flower_supernode

    if os.environ.get("MEDFED_WARM_SOCKET"):
        os.environ.setdefault("MEDFED_WARM_PYTHON", sys.executable)
        os.environ["PATH"] = f"{WARM_BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    if problems := patience.findings():
        for problem in problems:
            log(WARNING, "Connections are not tried again but as Flower does it: %s", problem)
    else:
        patience.install()
    if problems := [*findings(), *lifeline.findings(), *watch.findings()]:
        for problem in problems:
            log(WARNING, "Adaptive polling is off, Flower polls as it does by itself: %s", problem)
    elif not _isolation_is_stock(sys.argv):
        log(WARNING, "Adaptive polling is off: --isolation was given")
    else:
        secret_file = install()
        sys.argv += ["--isolation", "process", "--superexec-auth-secret-file", secret_file]
    flower_supernode()


def _isolation_is_stock(argv: list[str]) -> bool:
    return not any(argument.split("=")[0] == "--isolation" for argument in argv)


def install() -> str:
    """Replace the names listed in ``INTERNALS``; call it once, before ``flower_supernode()``.

    Returns:
        Where ``flower-supernode`` can read the secret that only this process's SuperExec knows:
        with it nobody else on the machine can take this SuperNode's tasks.
    """
    from flwr.supercore import log

    supernode, superexec = (_import(name) for name in INTERNALS)
    command = _import("flwr.supernode.cli.flower_supernode")
    bell = threading.Event()
    clock = SuperNodeClock(Pace(), bell)
    pull_and_store_message = supernode._pull_and_store_message
    push_messages = supernode._push_messages
    wire = _wire_log()
    life = lifeline.install()
    run_id: int | None = None

    def pull_and_note_run(**arguments: Any) -> int | None:
        nonlocal run_id
        ask = arguments.pop("receive")

        def receive() -> Any:
            if (received := ask()) is not None:
                life.working()
            return received

        run_id = pull_and_store_message(receive=receive, **arguments)
        if run_id is None:
            watch.forget_what_did_not_arrive(arguments["state"])
            life.resting()
        return run_id

    def note_message_and_push(**arguments: Any) -> None:
        clock.message_arrived()  # it is stored, and its reply is waited for next
        state = watch.WholeReplies(arguments.pop("state"))
        push_messages(state=state, **arguments)
        life.resting()
        if run_id is not None:
            wire.reply_left(run_id)

    _replace(supernode, "time", clock)
    _replace(supernode, "_pull_and_store_message", pull_and_note_run)
    _replace(supernode, "_push_messages", note_message_and_push)
    _replace(superexec, "time", SuperExecClock(bell))
    # The SuperNode has its own, and Python refuses signal handlers outside the main thread.
    _replace(superexec, "register_signal_handlers", _no_signal_handlers)
    start_client = command.start_client_internal

    def start_client_with_superexec(**settings: Any) -> None:
        arguments = {
            "runtime_api_address": settings["runtime_api_address"],
            "insecure": settings["runtime_certificates"] is None,
            "root_certificates_path": settings["runtime_root_certificates_path"],
            "superexec_auth_secret": settings["superexec_auth_secret"],
            "runtime_dependency_install": settings["runtime_dependency_install"],
        }
        watch.ClientAppWatch(settings["state_factory"].state()).install()
        threading.Thread(
            target=_superexec, args=(arguments,), name="superexec", daemon=True
        ).start()
        log(INFO, "Adaptive polling is on; SuperExec runs in this process")
        start_client(**settings)
        # It never ends by itself but for a fault, and would leave a process that serves nobody.
        log(ERROR, "The connection to the SuperLink ended, so this SuperNode stops")
        os.kill(os.getpid(), signal.SIGTERM)

    _replace(command, "start_client_internal", start_client_with_superexec)
    return _secret_file()


def _wire_log() -> WireLog:
    """The log of what crosses the wire, beside the rest of this SuperNode's state."""
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    meter = Meter()
    meter.install()
    return WireLog(home / "wire.jsonl", meter)


def _superexec(arguments: dict[str, Any]) -> None:
    """Run SuperExec; a SuperNode without one would accept messages and never answer them."""
    from flwr.supercore import log
    from flwr.supercore.superexec.run_superexec import run_superexec

    try:
        run_superexec(**arguments)
    except BaseException as error:  # noqa: BLE001  (SystemExit too: it ends only this thread)
        log(ERROR, "SuperExec ended, so this SuperNode stops: %r", error)
    os.kill(os.getpid(), signal.SIGTERM)


def _no_signal_handlers(**_settings: object) -> None:
    """Take the place of Flower's ``register_signal_handlers`` in SuperExec's thread."""


def _secret_file() -> str:
    """A fresh secret in memory, readable as a file by this process and never on a disk."""
    descriptor = os.memfd_create("superexec-secret", os.MFD_CLOEXEC)
    os.write(descriptor, secrets.token_bytes(32))
    return f"/proc/self/fd/{descriptor}"
