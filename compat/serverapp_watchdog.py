"""Hook: a ServerApp that dies is started again, under the same run id.

Flower starts a ServerApp's process and forgets it. When it is killed, or goes down with
its SuperLink, the run is marked as failed a minute later. Here SuperExec, which starts ServerApps,
runs as a thread of the SuperLink that is called when there is something to start, and

- a ServerApp that ends without having finished its task is started again, at once the first time;
- so is one that was at work when the SuperLink itself went down, once that is up again;
- one that is only silent, as on a machine that was paused, is not given up after a minute;
- until the new one is at work, SuperNodes can hand over replies and fetch what they need. Flower
  refuses both while a run has no running ServerApp, and a refused reply is thrown away.

A task goes back to PENDING exactly as Flower puts one back whose process never came up
(``SqlCoreState._cleanup_expired_task_tokens``); messages and replies of the run stay. What has been
trained is the app's own business: it goes on from its ledger. A run that was stopped, or failed by
itself, is finished and is never touched.

Because SuperExec is in this process the SuperLink has a secret for it that is in no file: nobody
else on the machine can take a run's task, which in Flower's default isolation anybody can.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from logging import ERROR, INFO, WARNING
from types import SimpleNamespace
from typing import Any

from common.retry import RetryPolicy

from . import superexec
from .digests import replace
from .hooks import Hook

HOOK = Hook(
    name="serverapp_watchdog",
    gives="a ServerApp that dies, also with its SuperLink, is started again under its run id",
    without="a run whose ServerApp or SuperLink dies is marked as failed a minute later",
    pins={
        "flwr.superlink.cli.flower_superlink": {
            "SuperLinkLifespan.startup": "b0244511814dfd31",
            "SuperLinkLifespan.shutdown": "72868137a4a87ab7",
            "SuperLinkLifespan._start_superexec_if_needed": "134a554c9e570981",
            "_get_superexec_command": "5d60007f01d10102",
        },
        superexec.MODULE: superexec.PINS,
        "flwr.supercore.superexec.executor.subprocess_executor": {
            "SubprocessExecutor.launch": "83abf3dbe02281fd",
        },
        "flwr.supercore.corestate.sql_corestate": {
            "SqlCoreState._cleanup_expired_task_tokens": "34301eae2ee4a008",
            "SqlCoreState.claim_task": "35fd1c6c4f6aa488",
            "SqlCoreState.activate_task": "358975eb70e41786",
            "SqlCoreState.acknowledge_task_heartbeat": "b4e87c4b327d6978",
            "SqlCoreState.finish_task": "8bad718954b9218b",
            "SqlCoreState.get_task_by_token": "cf6795c4851955b9",
        },
        "flwr.server.superlink.utils": {"check_abort": "4990608beb174034"},
        "flwr.superlink.servicer.fleet.fleet_handlers": {
            "push_messages": "70c2fe927c6693b0",
            "push_object": "df7e96f1188e0a40",
            "pull_object": "78f6d45fda46df47",
            "get_run": "004ad390c8b38c0e",
            "get_fab": "8778f0626c77d66d",
            "confirm_message_received": "52bf47754a452d94",
        },
    },
)
_EXECUTOR = "flwr.supercore.superexec.executor.subprocess_executor"
_PROGRAM = "flwr-serverapp"
STEADY_S = 60.0
_RESTARTS = RetryPolicy(first_s=1.0, longest_s=30.0)
MOST_QUICK_DEATHS = 8
# A day of heartbeat intervals: what has a watch on its process needs no other proof of life.
_PATIENCE = 2880
_DATABASE_RETRY_S = 5.0
_LOOKS_EVERY_S = 10.0  # for what became due by itself: automations, claims that ran out

_due = threading.Event()


def call() -> None:
    """Call SuperExec: there may be something to start."""
    _due.set()


class CalledClock:
    """Stands in for the module ``time`` in ``run_superexec``: it waits until it is called."""

    def sleep(self, seconds: float) -> None:
        """Wait for :func:`call` where Flower sleeps ``seconds``."""
        del seconds
        _due.wait(_LOOKS_EVERY_S)
        _due.clear()


def requeue(state: Any, token: str | None = None) -> list[int]:
    """Put ServerApps that were started and have not finished back in the queue.

    Args:
        state: Flower's ``SqlLinkState``.
        token: of the one to put back; None: all of them.

    Returns:
        Their run ids.
    """
    from flwr.supercore.constant import TaskType
    from flwr.supercore.state.schema.corestate_models import Task
    from flwr.supercore.utils import int64_to_uint64
    from sqlalchemy import update

    claimed = Task.token.is_not(None) if token is None else Task.token == token
    statement = (
        update(Task)
        .where(Task.type == TaskType.SERVER_APP, Task.finished_at.is_(None), claimed)
        .values(
            token=None,
            active_until=None,
            starting_at=None,
            running_at=None,
            sub_status="",
            details="",
        )
        .returning(Task.run_id)
    )
    with state.session() as session:
        return [int64_to_uint64(run_id) for run_id in session.scalars(statement)]


class Restarts:
    """How long to wait before a run's ServerApp is started again.

    Not at all the first time. One that dies again and again within ``STEADY_S`` seconds of its
    start waits 1, 2, 4 … 30 s, and is given up after ``MOST_QUICK_DEATHS``.
    """

    def __init__(self) -> None:
        self._quick: dict[int, Iterator[float]] = {}

    def wait(self, run_id: int, lived: float) -> float | None:
        """Seconds to wait after a death, ``lived`` seconds after the start; None: give up."""
        if lived >= STEADY_S:
            self._quick.pop(run_id, None)
            return 0.0
        waits = chain([0.0], islice(_RESTARTS.waits(), MOST_QUICK_DEATHS - 1))
        return next(self._quick.setdefault(run_id, waits), None)


class ServerAppWatchdog:
    """Watches the ServerApps that SuperExec starts in this process.

    Args:
        state: Flower's ``SqlLinkState``.
        wait: how to wait, seconds.
    """

    def __init__(self, state: Any, wait: Callable[[float], None] = time.sleep) -> None:
        self._state, self._wait = state, wait
        self._restarts = Restarts()

    def install(self) -> None:
        """Have SuperExec start ServerApps through :meth:`launch`."""
        stand_in = SimpleNamespace(Popen=self.launch, DEVNULL=subprocess.DEVNULL)
        replace(_EXECUTOR, "subprocess", stand_in)

    def launch(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes] | None:
        """Start a process and, if it is a ServerApp, watch it until it ends.

        In a session of its own, as Flower does: Ctrl-C is the SuperLink's alone.

        Returns:
            The process; None for a ServerApp that could not be started, which is tried again.
        """
        call()  # SuperExec takes one task each time it looks: there may be another
        if arguments[0] != _PROGRAM:
            return subprocess.Popen(arguments, **options, start_new_session=True)
        token = arguments[arguments.index("--token") + 1]
        try:
            process = subprocess.Popen(arguments, **options, start_new_session=True)
        except OSError as error:
            self._in_a_thread(self.ended, token, f"could not be started: {error.strerror}", 0.0)
            return None
        self._in_a_thread(self._follow, process, token)
        return process

    def _in_a_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(
            target=function, args=arguments, name="serverapp-watchdog", daemon=True
        ).start()

    def _follow(self, process: subprocess.Popen[bytes], token: str) -> None:
        began = time.monotonic()
        how = superexec.how_it_ended(process.wait())
        self.ended(token, how, time.monotonic() - began)

    def ended(self, token: str, how: str, lived: float) -> None:
        """A ServerApp has ended, ``lived`` seconds after its start."""
        from flwr.common import log
        from flwr.common.constant import SubStatus

        task = self._surely(self._state.get_task_by_token, token)
        if task is None:  # it has finished its task, or the run was stopped
            return
        wait = self._restarts.wait(task.run_id, lived)
        if wait is None:
            details = f"the ServerApp died {MOST_QUICK_DEATHS + 1} times in a row, lastly: {how}"
            log(ERROR, "Run %d is given up: %s", task.run_id, details)
            self._surely(self._state.finish_task, task.task_id, SubStatus.FAILED, details)
            return
        log(
            WARNING,
            "The ServerApp of run %d ended before its run did (%s): starting it again in %.0f s",
            task.run_id,
            how,
            wait,
        )
        self._wait(wait)
        if self._surely(requeue, self._state, token):
            call()

    def _surely(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call it until it succeeds: a full disk, say, must not make a run wait for ever."""
        from flwr.common import log

        while True:
            try:
                return function(*arguments)
            except Exception as error:  # noqa: BLE001  (whatever the database may say)
                log(ERROR, "A run's ServerApp has ended and cannot be started again yet: %s", error)
                self._wait(_DATABASE_RETRY_S)


def accept_between_server_apps() -> None:
    """Let SuperNodes hand over replies while a run's ServerApp is being started again."""
    from flwr.common.constant import Status
    from flwr.server.superlink.utils import check_abort

    def finished(run_id: int, _refused: list[str], state: Any) -> str | None:
        return check_abort(run_id, [Status.FINISHED], state)

    replace("flwr.superlink.servicer.fleet.fleet_handlers", "check_abort", finished)


def install() -> list[str]:
    """Put all of this in place in the SuperLink that this process is about to start.

    Returns:
        Further arguments for ``flower-superlink``.
    """

    def start_superexec(lifespan: Any) -> None:
        """Called in the SuperLink's start-up, before it serves anybody."""
        from flwr.common import log
        from flwr.supercore.address import resolve_bind_address

        state, config = lifespan.state_factory.state(), lifespan.config
        for run_id in requeue(state):
            log(INFO, "Run %d goes on: its ServerApp went down with the SuperLink", run_id)
        ServerAppWatchdog(state).install()
        host = f"[{config.host}]" if ":" in config.host else config.host
        superexec.start(
            runtime_api_address=resolve_bind_address(f"{host}:{config.port}"),
            insecure=config.certificates is None,
            root_certificates_path=config.ssl_ca_certfile,
            superexec_auth_secret=config.superexec_auth_secret,
            runtime_dependency_install=config.runtime_dependency_install,
        )

    replace("flwr.supercore.corestate.sql_corestate", "HEARTBEAT_PATIENCE", _PATIENCE)
    command = "flwr.superlink.cli.flower_superlink"
    replace(command, "SuperLinkLifespan._start_superexec_if_needed", start_superexec)
    superexec.install(CalledClock())
    accept_between_server_apps()
    return superexec.secret_arguments()
