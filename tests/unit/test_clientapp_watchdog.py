"""A ClientApp that exits without a reply is answered with an error at once."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode, Status, SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from compat import clientapp_watchdog, superexec

RUN = 7


class Node:
    """A SuperNode's state, with a message that waits for a ClientApp."""

    def __init__(self) -> None:
        self.state = InMemoryNodeState(InMemoryObjectStore())
        self.state.set_node_id(1)
        self.watch = clientapp_watchdog.ClientAppWatchdog(self.state)

    def message(self, name: str = "a" * 64) -> Message:
        about = Metadata(
            run_id=RUN,
            message_id=name,
            src_node_id=0,
            dst_node_id=1,
            reply_to_message_id="",
            group_id="1",
            created_at=1.0,
            ttl=1e9,
            message_type="train",
        )
        message = make_message(metadata=about, content=RecordDict())
        self.state.store_message(message)
        self.task = self.state.create_task(TaskType.CLIENT_APP, RUN)
        token = self.state.claim_task(self.task)
        assert token is not None
        self.token = token
        return message

    def command(self) -> list[str]:
        return ["flwr-clientapp", "--token", self.token]

    def take(self) -> None:
        """What the ClientApp does first."""
        self.state.activate_task(self.task)
        (message,) = self.state.get_messages_legacy(run_ids=[RUN], is_reply=False, limit=1)
        self.state.record_message_processing_start(message.metadata.message_id)

    def reply(self, message: Message, parts: int | None = None) -> str:
        """What it does last: hand over ``parts`` of the objects of its reply (None: all)."""
        content = RecordDict({"a": ArrayRecord([np.ones(3)]), "c": ConfigRecord({"x": 1})})
        reply = Message(content, reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.state.record_message_processing_end(message.metadata.message_id)
        session = self.state.start_session(RUN)
        self.state.store_message_and_object_tree(reply, get_object_tree(reply), session)
        objects = list(get_all_nested_objects(reply).items())
        assert len(objects) > 3
        for name, one in objects[:parts]:
            assert self.state.store_object(RUN, session, name, one.deflate())
        return reply.metadata.message_id

    def replies(self) -> list[Message]:
        """As the sender sees them."""
        return clientapp_watchdog.WholeReplies(self.state).get_messages_legacy(is_reply=True)


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def clientapp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a ``flwr-clientapp`` on PATH that runs a line of shell."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(line: str) -> None:
        program = tmp_path / "flwr-clientapp"
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)

    return write


def run(node: Node, meanwhile: Callable[[], Any] = lambda: None) -> None:
    """Launch the ClientApp, let it do something, and wait until its end has been dealt with."""
    process = node.watch.launch(node.command(), stdin=subprocess.PIPE)
    assert process is not None
    meanwhile()
    assert process.stdin is not None
    process.stdin.close()
    for thread in threading.enumerate():
        if thread.name == "clientapp-watchdog":
            thread.join(10)


def assert_answered(node: Node, how: str) -> None:
    (reply,) = node.replies()
    assert reply.metadata.reply_to_message_id == "a" * 64
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert reply.error.reason == f"the ClientApp ended without an answer: {how}"
    (task,) = node.state.get_tasks()
    assert (task.status.status, task.status.sub_status) == (Status.FINISHED, SubStatus.FAILED)
    assert node.state.get_task_by_token(node.token) is None
    assert node.state.get_message_processing_duration("a" * 64) >= 0


def test_one_killed_before_it_took_its_message_is_answered_for(node, clientapp):
    clientapp("kill -9 $$")
    node.message()
    run(node)
    assert_answered(node, "killed by SIGKILL, as when memory runs out")


def test_one_that_ends_in_training_is_answered_for(node, clientapp):
    clientapp("read _; exit 7")
    node.message()
    run(node, node.take)
    assert_answered(node, "exit status 7")


def test_one_that_fails_its_task_without_an_answer_is_answered_for(node, clientapp):
    """As a ClientApp does that gets SIGTERM; stock Flower waits for its reply for ever."""
    clientapp("read _; exit 0")
    node.message()
    run(node, lambda: (node.take(), node.state.finish_task(node.task, SubStatus.FAILED, "")))
    assert_answered(node, "exit status 0")


@pytest.mark.parametrize("parts", [0, 1, 3])
def test_half_a_reply_is_taken_back_and_answered_for(node, clientapp, parts):
    clientapp("read _; kill -9 $$")
    message = node.message()
    run(node, lambda: (node.take(), node.reply(message, parts)))
    assert_answered(node, "killed by SIGKILL, as when memory runs out")


def test_half_a_reply_that_the_sender_has_seen_is_taken_back_too(node, clientapp):
    clientapp("read _; kill -9 $$")
    message = node.message()
    sender = clientapp_watchdog.WholeReplies(node.state)

    def hand_half_over() -> None:
        node.take()
        node.reply(message, 1)
        assert sender.get_messages_legacy(is_reply=True) == []

    run(node, hand_half_over)
    (reply,) = sender.get_messages_legacy(is_reply=True)
    assert reply.has_error()
    assert sender.get_messages_legacy(is_reply=True) == []


def test_a_whole_reply_is_sent_however_its_clientapp_ends(node, clientapp):
    clientapp("read _; kill -9 $$")
    message = node.message()
    run(node, lambda: (node.take(), node.reply(message)))
    (reply,) = node.replies()
    assert not reply.has_error()
    (task,) = node.state.get_tasks()
    assert task.status.status == Status.FINISHED, "or it would be started again"


def test_a_slow_end_is_not_taken_for_the_next_messages(node, clientapp):
    clientapp("read _; exit 1")
    message = node.message()

    def reply_and_get_another() -> None:
        node.take()
        reply = node.reply(message)
        assert len(node.replies()) == 1
        node.state.delete_messages(message_ids=[reply, "a" * 64])
        node.message("b" * 64)

    run(node, reply_and_get_another)
    assert node.replies() == []
    assert node.state.get_task_by_token(node.token) is not None


def test_one_that_cannot_be_started_is_answered_for(node, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    node.message()
    assert node.watch.launch(node.command()) is None
    assert_answered(node, "could not be started: No such file or directory")


def test_what_is_no_clientapp_is_none_of_its_business(node):
    node.message()
    process = node.watch.launch(["false", "--token", node.token])
    assert process is not None
    process.wait()
    assert not any(one.name == "clientapp-watchdog" for one in threading.enumerate())
    assert node.replies() == []


def test_a_reply_is_given_out_once_and_when_all_of_it_is_there(node):
    message = node.message()
    node.take()
    content = RecordDict({"a": ArrayRecord([np.ones(3)])})
    reply = Message(content, reply_to=message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    session = node.state.start_session(RUN)
    node.state.store_message_and_object_tree(reply, get_object_tree(reply), session)
    sender = clientapp_watchdog.WholeReplies(node.state)
    for name, one in get_all_nested_objects(reply).items():
        assert sender.get_messages_legacy(is_reply=True) == []
        node.state.store_object(RUN, session, name, one.deflate())
    (given,) = sender.get_messages_legacy(is_reply=True)
    assert given.metadata.message_id == reply.metadata.message_id
    assert sender.get_messages_legacy(is_reply=True) == []


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exit status 0"),
        (137, "exit status 137"),
        (-9, "killed by SIGKILL, as when memory runs out"),
        (-11, "killed by SIGSEGV"),
        (-63, "killed by signal 63"),
    ],
)
def test_an_end_is_told_in_words(status, words):
    assert superexec.how_it_ended(status) == words


def test_a_message_whose_run_was_stopped_on_its_way_leaves_nothing_behind(node):
    node.message()
    clientapp_watchdog.forget_what_did_not_arrive(node.state)
    assert not node.state.msg_store
    (task,) = node.state.get_tasks()
    assert task.status.status == Status.FINISHED
    assert node.state.get_task_by_token(node.token) is None
    clientapp_watchdog.forget_what_did_not_arrive(node.state)  # and nothing is nothing
