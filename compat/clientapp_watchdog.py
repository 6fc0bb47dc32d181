"""Hook: a ClientApp that exits without a reply is answered with an error at once.

Flower starts a ClientApp's process and forgets it. One that is killed in training is noticed after
a minute without heartbeats. One that is killed before it has taken its message, or that is told to
stop, is never noticed. One that is killed while it hands its reply over leaves half a reply, for
whose other half the SuperNode waits for ever. Here

- the process is watched, and when it ends its message gets an error reply at once if it has none;
- a reply counts as there when all its objects are there, so half a reply can still be taken back.

Replaced: ``subprocess`` in ``subprocess_executor``, which then starts ClientApps through here.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from logging import WARNING
from types import SimpleNamespace
from typing import Any

from . import superexec
from .digests import replace
from .hooks import Hook

_EXECUTOR = "flwr.supercore.superexec.executor.subprocess_executor"
HOOK = Hook(
    name="clientapp_watchdog",
    gives="an error reply at once for a ClientApp that ends without one",
    without="a ClientApp that is killed is noticed after a minute, or never",
    pins={
        _EXECUTOR: {"SubprocessExecutor.launch": "83abf3dbe02281fd"},
        "flwr.supernode.start_client_internal": {
            "_insert_message": "a0c6f4605e993f04",
            "_push_messages": "00bb86faffdec114",
        },
        "flwr.supernode.nodestate.in_memory_nodestate": {
            "InMemoryNodeState.get_messages_legacy": "1a5a9140a90c95b9",
            "InMemoryNodeState.store_message": "8d38cc83c3fb7d5a",
            "InMemoryNodeState.delete_messages": "b5305a764184df89",
            "InMemoryNodeState.finish_task": "6800803a9677cd3d",
            "InMemoryNodeState.record_message_processing_start": "be1591d854ff1512",
            "InMemoryNodeState.record_message_processing_end": "46dac2722579f70e",
        },
        "flwr.supercore.corestate.in_memory_corestate": {
            "InMemoryCoreState.finish_task": "74802c12902fb68b",
            "InMemoryCoreState.get_task_by_token": "08f66c55f91ccc5f",
        },
    },
    requires=("supernode_polling",),  # which runs SuperExec in this process
)
_PROGRAM = "flwr-clientapp"
_OPEN = ("pending", "starting", "running")  # flwr.common.constant.Status


def forget_what_did_not_arrive(state: Any) -> None:
    """Forget a message whose run was stopped while it was on its way here.

    Flower keeps the message and its task. With the next message both are worked on, the
    wrong reply is taken for its answer, and the right one lies there until a third message comes.

    Args:
        state: the SuperNode's, when no message is being worked on.
    """
    if not state.msg_store:
        return
    for message_id in list(state.msg_store):
        state.delete_messages(message_ids=[message_id])
        state.object_store.delete(message_id)
    for task in state.get_tasks(statuses=_OPEN):
        state.finish_task(task.task_id, "failed", "its message did not arrive")


class ClientAppWatchdog:
    """Answers for ClientApps that end without having answered.

    Args:
        state: the SuperNode's, in memory: Flower's ``InMemoryNodeState``.
    """

    def __init__(self, state: Any) -> None:
        self._state = state

    def install(self) -> None:
        """Have SuperExec, which runs in this process, start ClientApps through :meth:`launch`."""
        stand_in = SimpleNamespace(Popen=self.launch, DEVNULL=subprocess.DEVNULL)
        replace(_EXECUTOR, "subprocess", stand_in)

    def launch(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes] | None:
        """Start a process and, if it is a ClientApp, watch it until it ends.

        Returns:
            The process; None if it could not be started, which has been answered then.
        """
        if arguments[0] != _PROGRAM:
            return subprocess.Popen(arguments, **options)
        task = self._state.get_task_by_token(arguments[arguments.index("--token") + 1])
        # The SuperNode works on one message at a time, so what is open is this ClientApp's.
        asked = self._unanswered(task.run_id) if task is not None else []
        try:
            process = subprocess.Popen(arguments, **options)
        except OSError as error:
            self._ended(task, asked, f"could not be started: {error.strerror}")
            return None
        threading.Thread(
            target=lambda: self._ended(task, asked, superexec.how_it_ended(process.wait())),
            name="clientapp-watchdog",
            daemon=True,
        ).start()
        return process

    def _unanswered(self, run_id: int) -> list[str]:
        with self._state.lock_msg_store:
            messages = [entry.message.metadata for entry in self._state.msg_store.values()]
        answered = {one.reply_to_message_id for one in messages}
        return [
            one.message_id
            for one in messages
            if one.run_id == run_id
            and not one.reply_to_message_id
            and one.message_id not in answered
        ]

    def _ended(self, task: Any, asked: list[str], how: str) -> None:
        """A ClientApp has ended: answer those of its messages that have no whole reply."""
        if task is None:
            return
        from flwr.app import Error, Message
        from flwr.common import log
        from flwr.common.constant import ErrorCode, SubStatus
        from flwr.supernode.start_client_internal import _insert_message

        state = self._state
        reason = f"the ClientApp ended without an answer: {how}"
        # First, for it takes the token back: whatever still holds it can hand nothing over now. A
        # task that is finished stays so, and one that is not would be started again.
        state.finish_task(task.task_id, SubStatus.FAILED, reason)
        with state.lock_msg_store:
            for message_id in asked:
                self._take_back_half_a_reply(message_id)
                entry = state.msg_store.get(message_id)
                if entry is None or message_id not in self._unanswered(task.run_id):
                    continue
                entry.is_retrieved = True
                if message_id not in state.time_store:
                    state.record_message_processing_start(message_id)
                state.record_message_processing_end(message_id)
                log(WARNING, "Message %s: %s", message_id, reason)
                error = Error(code=ErrorCode.CLIENT_APP_CRASHED, reason=reason)
                _insert_message(Message(error, reply_to=entry.message), state, state.object_store)

    def _take_back_half_a_reply(self, message_id: str) -> None:
        state = self._state
        for entry in list(state.msg_store.values()):
            about = entry.message.metadata
            if about.reply_to_message_id == message_id and not is_complete(
                state.object_store, about.message_id
            ):
                state.delete_messages(message_ids=[about.message_id])
                state.object_store.delete(about.message_id)


class WholeReplies:
    """The SuperNode's state as the sender of replies sees it: only whole replies are in it.

    Args:
        state: Flower's ``InMemoryNodeState``.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self._arriving: list[Any] = []

    def get_messages_legacy(self, *, is_reply: bool) -> list[Any]:
        """Replies that have not been given out and are all here. It sees each of them once."""
        looked_at = self._arriving + list(self._state.get_messages_legacy(is_reply=is_reply))
        self._arriving = []
        whole = []
        for message in looked_at:
            message_id = message.metadata.message_id
            if is_complete(self._state.object_store, message_id):
                whole.append(message)
            elif message_id in self._state.msg_store:  # else it was taken back
                self._arriving.append(message)
        return whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def is_complete(store: Any, message_id: str) -> bool:
    """Whether a message and all that it consists of are in Flower's object store."""
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.object_store import NoObjectInStoreError

    try:
        tree = store.get_object_tree(message_id)
    except NoObjectInStoreError:
        return False
    return all(store.get(part.object_id) for part in iterate_object_tree(tree))
