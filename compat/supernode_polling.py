"""Hook: a SuperNode polls its SuperLink at an adaptive pace, and SuperExec is a thread of it.

Flower sleeps a fixed 3 s between two polls of the SuperLink, 0.5 s between two looks for the
ClientApp's reply, and starts a second process (``flower-superexec``) that polls the SuperNode once
a second for a message to work on. Here

- the SuperLink is polled again at once when it held the last request open until there was news
  (``long_polling``), and at an adaptive pace when it did not;
- the reply is looked for in this process's own memory, every 20 ms while one is due;
- SuperExec's own loop runs in a thread of the SuperNode, which sets an event when a message has
  arrived: one process less for each SuperNode, no wait, and no polling at rest.

Replaced: ``time``, ``_pull_and_store_message`` and ``_push_messages`` of ``start_client_internal``;
``time`` and ``register_signal_handlers`` of ``run_superexec``; ``start_client_internal`` as the
command calls it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from importlib import import_module
from logging import ERROR, INFO
from typing import Any

from . import clientapp_watchdog, heartbeats, superexec
from .digests import original, replace
from .hooks import Hook

_WORKER = "flwr.supernode.start_client_internal"
_COMMAND = "flwr.supernode.cli.flower_supernode"
_AT_REST_S = 3.0  # the stock sleep of `start_client_internal`, by which its calls are told apart


def _modules_named_time() -> list[str]:
    """What is replaced is the module ``time`` as these two import it."""
    return [
        f"expected {module} to import the module time"
        for module in (_WORKER, superexec.MODULE)
        if original(module, "time") is not time
    ]


HOOK = Hook(
    name="supernode_polling",
    gives="a message is worked on at once, by one process less for each SuperNode",
    without="a message waits for up to 5 s between the SuperLink, the SuperNode and its ClientApp",
    pins={
        _WORKER: {
            "start_client_internal": "9e89a6eb68fbec68",
            "_pull_and_store_message": "eaf5d0e36dc34e4c",
            "_push_messages": "00bb86faffdec114",
        },
        superexec.MODULE: superexec.PINS,
        _COMMAND: {"flower_supernode": "e263e10452076b00"},
    },
    check=_modules_named_time,
)


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
        event: set when there is a message to work on.
        reply: seconds between two looks for the ClientApp's reply, in this process's memory.
        ring: seconds after which the event rings again while the reply is still due.
        sleep: what really sleeps.
    """

    def __init__(
        self,
        pace: Pace,
        event: threading.Event,
        *,
        reply: float = 0.02,
        ring: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._pace, self._event, self._reply, self._sleep = pace, event, reply, sleep
        self._looks_per_signal = max(1, round(ring / reply))
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
        if self._looks % self._looks_per_signal == 0:
            self._event.set()
        self._looks += 1
        self._pace.message()
        self._sleep(self._reply)


class SuperExecClock:
    """Stands in for the module ``time`` in ``run_superexec``: it waits for the event.

    Args:
        event: set when there may be a task.
        longest: seconds after which it looks without having been called.
    """

    def __init__(self, event: threading.Event, longest: float = 60.0) -> None:
        self._event, self._longest = event, longest

    def sleep(self, seconds: float) -> None:
        """Wait for the event where stock Flower sleeps ``seconds``."""
        del seconds
        self._event.wait(self._longest)
        self._event.clear()


def install(
    *,
    with_heartbeats: bool = True,
    with_watchdog: bool = True,
    reply_left: Callable[[int], None] = lambda run_id: None,
) -> list[str]:
    """Put this hook in place; call it once, before ``flower_supernode()``.

    Args:
        with_heartbeats: have the hook ``heartbeats`` as well.
        with_watchdog: have the hook ``clientapp_watchdog`` as well.
        reply_left: told the run of each reply that has reached the SuperLink.

    Returns:
        Further arguments for ``flower-supernode``: where it can read the secret that only this
        process's SuperExec knows. With it nobody else on the machine can take this SuperNode's
        tasks.
    """
    from flwr.common import log

    supernode = import_module(_WORKER)
    event = threading.Event()
    clock = SuperNodeClock(Pace(), event)
    pull_and_store_message = supernode._pull_and_store_message
    push_messages = supernode._push_messages
    start_client = import_module(_COMMAND).start_client_internal
    sender = heartbeats.install() if with_heartbeats else None
    run_id: int | None = None

    def pull_and_note_run(**arguments: Any) -> int | None:
        nonlocal run_id
        ask = arguments.pop("receive")

        def receive() -> Any:
            if (received := ask()) is not None and sender is not None:
                sender.working()
            return received

        run_id = pull_and_store_message(receive=receive, **arguments)
        if run_id is None:
            if with_watchdog:
                clientapp_watchdog.forget_what_did_not_arrive(arguments["state"])
            if sender is not None:
                sender.resting()
        return run_id

    def note_message_and_push(**arguments: Any) -> None:
        clock.message_arrived()  # it is stored, and its reply is waited for next
        state = arguments.pop("state")
        if with_watchdog:
            state = clientapp_watchdog.WholeReplies(state)
        push_messages(state=state, **arguments)
        if sender is not None:
            sender.resting()
        if run_id is not None:
            reply_left(run_id)

    replace(_WORKER, "time", clock)
    replace(_WORKER, "_pull_and_store_message", pull_and_note_run)
    replace(_WORKER, "_push_messages", note_message_and_push)
    superexec.install(SuperExecClock(event))

    def start_client_with_superexec(**settings: Any) -> None:
        if with_watchdog:
            clientapp_watchdog.ClientAppWatchdog(settings["state_factory"].state()).install()
        superexec.start(
            runtime_api_address=settings["runtime_api_address"],
            insecure=settings["runtime_certificates"] is None,
            root_certificates_path=settings["runtime_root_certificates_path"],
            superexec_auth_secret=settings["superexec_auth_secret"],
            runtime_dependency_install=settings["runtime_dependency_install"],
        )
        log(INFO, "Adaptive polling is on; SuperExec runs in this process")
        start_client(**settings)
        # It never ends by itself but for a fault, and would leave a process that serves nobody.
        log(ERROR, "The connection to the SuperLink ended, so this SuperNode stops")
        os.kill(os.getpid(), signal.SIGTERM)

    replace(_COMMAND, "start_client_internal", start_client_with_superexec)
    return superexec.secret_arguments()
