"""A ServerApp that dies is started again, and what is finished stays so."""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.common.constant import Status, SubStatus
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import TaskType
from flwr.supercore.date import now
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.state.schema.corestate_models import Task
from flwr.superlink.federation import NoOpFederationManager
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, update

from compat import serverapp_watchdog, superexec


@pytest.fixture
def state() -> SqlLinkState:
    made = SqlLinkState(":memory:", NoOpFederationManager(), InMemoryObjectStore())
    made.initialize()
    return made


@pytest.fixture(autouse=True)
def _nobody_called() -> None:
    serverapp_watchdog._due.clear()


def a_task(state: SqlLinkState, kind: str = TaskType.SERVER_APP, run_id: int = 2**63 + 5) -> int:
    task = state.create_task(kind, run_id)
    assert task is not None
    return task


def claimed(state: SqlLinkState, task: int) -> str:
    token = state.claim_task(task)
    assert token is not None
    return token


def at_work(state: SqlLinkState, **which: Any) -> tuple[int, str]:
    task = a_task(state, **which)
    token = claimed(state, task)
    assert state.activate_task(task)
    return task, token


def status(state: SqlLinkState, task: int) -> str:
    (found,) = state.get_tasks(task_ids=[task])
    return str(found.status.status)


def test_a_requeued_task_is_started_again_under_its_run_id_and_the_old_token_is_worth_nothing(
    state,
):
    task, token = at_work(state)
    assert serverapp_watchdog.requeue(state) == [2**63 + 5]
    assert status(state, task) == Status.PENDING
    assert state.get_task_by_token(token) is None
    assert not state.acknowledge_task_heartbeat(task)
    assert claimed(state, task) != token
    assert state.activate_task(task)


def test_one_whose_heartbeats_ran_out_while_the_superlink_was_down_is_started_again_too(state):
    task, _ = at_work(state)
    with state.session() as session:
        session.execute(update(Task).values(active_until=now() - timedelta(hours=9)))
    assert len(serverapp_watchdog.requeue(state)) == 1
    assert status(state, task) == Status.PENDING


def test_what_waits_is_finished_or_is_no_serverapp_is_not_touched(state):
    waiting = a_task(state)
    finished = {}
    for how in (SubStatus.COMPLETED, SubStatus.FAILED, SubStatus.STOPPED):
        task, _ = at_work(state)
        assert state.finish_task(task, how, "by itself")
        finished[task] = how
    other, token = at_work(state, kind=TaskType.AGENT_APP)
    assert serverapp_watchdog.requeue(state) == []
    assert status(state, waiting) == Status.PENDING
    for task, how in finished.items():
        (found,) = state.get_tasks(task_ids=[task])
        assert (found.status.sub_status, found.status.details) == (how, "by itself")
    assert state.get_task_by_token(token) is not None
    assert status(state, other) == Status.RUNNING


def test_only_the_dead_ones_task_is_put_back_while_the_superlink_runs(state):
    dead, token = at_work(state)
    alive, _ = at_work(state, run_id=8)
    assert serverapp_watchdog.requeue(state, token) == [2**63 + 5]
    assert (status(state, dead), status(state, alive)) == (Status.PENDING, Status.RUNNING)


def watch(state: Any) -> tuple[serverapp_watchdog.ServerAppWatchdog, list[float]]:
    waited: list[float] = []
    return serverapp_watchdog.ServerAppWatchdog(state, waited.append), waited


def until_followed() -> None:
    for thread in threading.enumerate():
        if thread.name == "serverapp-watchdog":
            thread.join(10)


def launch(state: SqlLinkState, token: str, tmp_path: Path, monkeypatch: Any, line: str) -> None:
    program = tmp_path / "flwr-serverapp"
    program.write_text(f"#!/bin/sh\n{line}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    watch(state)[0].launch(["flwr-serverapp", "--token", token])
    until_followed()


@pytest.mark.parametrize("line", ["kill -9 $$", "exit 3", "exit 0"])
def test_a_serverapp_that_ends_before_its_run_is_put_back(state, tmp_path, monkeypatch, line):
    task, token = at_work(state)
    launch(state, token, tmp_path, monkeypatch, line)
    assert status(state, task) == Status.PENDING


def test_superexec_is_called_when_a_serverapp_was_put_back(state):
    _, token = at_work(state)
    watch(state)[0].ended(token, "killed by SIGKILL", lived=100.0)
    assert serverapp_watchdog._due.is_set()


@pytest.mark.parametrize("how", [SubStatus.COMPLETED, SubStatus.FAILED, SubStatus.STOPPED])
def test_a_serverapp_whose_run_is_over_is_not_started_again(state, tmp_path, monkeypatch, how):
    task, token = at_work(state)
    state.finish_task(task, how, "")
    launch(state, token, tmp_path, monkeypatch, "kill -9 $$")
    (found,) = state.get_tasks(task_ids=[task])
    assert (found.status.status, found.status.sub_status) == (Status.FINISHED, how)


def test_one_that_cannot_be_started_is_put_back(state, tmp_path, monkeypatch):
    task, token = at_work(state)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert watch(state)[0].launch(["flwr-serverapp", "--token", token]) is None
    until_followed()
    assert status(state, task) == Status.PENDING


def test_superexec_looks_again_after_each_start_for_it_takes_one_task_at_a_time(state):
    process = watch(state)[0].launch(["true"])
    assert process is not None
    process.wait()
    assert serverapp_watchdog._due.is_set()


def test_a_database_that_takes_nothing_now_is_asked_again_until_it_does(state, monkeypatch):
    task, token = at_work(state)
    watching, waited = watch(state)
    troubles = [OSError("database or disk is full")] * 3
    put_back = serverapp_watchdog.requeue

    def requeue(*arguments: Any) -> list[int]:
        if troubles:
            raise troubles.pop()
        return put_back(*arguments)

    monkeypatch.setattr(serverapp_watchdog, "requeue", requeue)
    watching.ended(token, "killed by SIGKILL", lived=100.0)
    assert waited == [0, 5, 5, 5]
    assert status(state, task) == Status.PENDING


def test_a_serverapp_has_a_session_of_its_own(state, tmp_path, monkeypatch):
    _, token = at_work(state)
    launch(state, token, tmp_path, monkeypatch, f"ps -o sid= -p $$ > {tmp_path}/sid; echo $$ >&2")
    assert int((tmp_path / "sid").read_text()) != os.getsid(0)


def test_one_that_dies_at_once_again_and_again_is_given_up_with_the_reason(state):
    watching, waited = watch(state)
    task = a_task(state)
    for _ in range(serverapp_watchdog.MOST_QUICK_DEATHS):
        watching.ended(claimed(state, task), "killed by SIGSEGV", lived=2.0)
        assert status(state, task) == Status.PENDING
    assert waited == [0, 1, 2, 4, 8, 16, 30, 30]
    watching.ended(claimed(state, task), "killed by SIGSEGV", lived=2.0)
    (found,) = state.get_tasks(task_ids=[task])
    assert found.status.sub_status == SubStatus.FAILED
    assert found.status.details == (
        "the ServerApp died 9 times in a row, lastly: killed by SIGSEGV"
    )


@given(st.lists(st.floats(0, 200), max_size=60))
def test_waits_are_short_and_a_steady_one_never_waits(lives):
    restarts = serverapp_watchdog.Restarts()
    quick = 0
    for lived in lives:
        quick = quick + 1 if lived < serverapp_watchdog.STEADY_S else 0
        wait = restarts.wait(1, lived)
        if quick <= 1:
            assert wait == 0
        elif quick <= serverapp_watchdog.MOST_QUICK_DEATHS:
            assert wait is not None
            assert 0 < wait <= 30
        else:
            assert wait is None


def test_one_runs_deaths_are_not_anothers():
    restarts = serverapp_watchdog.Restarts()
    for _ in range(5):
        restarts.wait(1, 0.0)
    assert restarts.wait(2, 0.0) == 0


@pytest.mark.parametrize(
    ("run", "refused"),
    [
        (Status.PENDING, False),
        (Status.STARTING, False),
        (Status.RUNNING, False),
        (Status.FINISHED, True),
    ],
)
def test_replies_are_taken_until_the_run_is_over(monkeypatch, run, refused):
    from flwr.superlink.servicer.fleet import fleet_handlers

    monkeypatch.setattr(fleet_handlers, "check_abort", fleet_handlers.check_abort)
    serverapp_watchdog.accept_between_server_apps()
    everything = [Status.PENDING, Status.STARTING, Status.FINISHED]
    cleaned_up: list[int] = []
    found = fleet_handlers.check_abort(
        7,
        everything,
        SimpleNamespace(
            get_run_status=lambda ids: {7: SimpleNamespace(status=run, sub_status="")},
            cleanup_run=cleaned_up.append,
        ),
    )
    assert (found is not None) == refused


def test_superexec_is_called_and_does_not_sleep_through_it():
    clock = serverapp_watchdog.CalledClock()
    serverapp_watchdog.call()
    clock.sleep(1)  # or this test takes ten seconds
    assert not serverapp_watchdog._due.is_set()


@pytest.fixture
def lifespan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The SuperLink's start-up, with everything that install() replaces put back afterwards."""
    from flwr.supercore.superexec.executor import subprocess_executor
    from flwr.superlink.servicer.fleet import fleet_handlers

    # Packages give some functions the names of the modules that they are in.
    superexec_module: Any = import_module("flwr.supercore.superexec.run_superexec")
    flower_superlink: Any = import_module("flwr.superlink.cli.flower_superlink")
    corestate: Any = import_module("flwr.supercore.corestate.sql_corestate")
    for owner, name in (
        (flower_superlink.SuperLinkLifespan, "_start_superexec_if_needed"),
        (corestate, "HEARTBEAT_PATIENCE"),
        (superexec_module, "time"),
        (superexec_module, "register_signal_handlers"),
        (subprocess_executor, "subprocess"),
        (fleet_handlers, "check_abort"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return flower_superlink.SuperLinkLifespan


def test_a_serverapp_that_is_silent_for_hours_is_not_given_up(state, lifespan):
    serverapp_watchdog.install()
    _, token = at_work(state)
    assert state.acknowledge_task_heartbeat(state.get_task_by_token(token).task_id)
    with state.session() as session:
        until = session.scalar(select(Task.active_until))
    assert until - now() > timedelta(hours=23)


def test_before_it_serves_the_superlink_puts_back_what_went_down_with_it(
    state, lifespan, monkeypatch
):
    task, _ = at_work(state)
    seen: list[str] = []
    begun = threading.Event()

    def run(_config: Any) -> None:
        seen.append(status(state, task))
        begun.set()

    monkeypatch.setattr(superexec, "_run", run)
    arguments = serverapp_watchdog.install()
    factory = SimpleNamespace(state=lambda: state, objectstore_factory=None)
    config: Any = SimpleNamespace(
        isolation="process",
        health_server_address=None,
        host="::1",
        port=8000,
        certificates=None,
        ssl_ca_certfile=None,
        superexec_auth_secret=b"secret",
        runtime_dependency_install=False,
    )
    lifespan(config, factory).startup()
    assert begun.wait(10)
    assert seen == [Status.PENDING]
    assert arguments[:3] == ["--isolation", "process", "--superexec-auth-secret-file"]
    assert len(Path(arguments[3]).read_bytes()) == 32
    assert not Path(arguments[3]).resolve().exists(), "it is in no file"
