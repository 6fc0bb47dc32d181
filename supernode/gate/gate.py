"""The gate itself: it stands between Flower's SuperNode and the connection to the SuperLink.

Towards the SuperNode it plays the SuperLink: it takes a reply whole, object by object, and keeps
it. Only what it then builds itself is sent on.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import zipfile
from dataclasses import dataclass, field
from logging import ERROR, WARNING
from typing import Any, NoReturn

from flwr.app import Error, Message
from flwr.common import log

from common.errors import SuperNodeError
from compat.fab import fab_metadata
from compat.messages import (
    AGENT_APP,
    ErrorCode,
    RunNotRunningException,
    get_all_nested_objects,
    get_object_tree,
    identified,
    iterate_object_tree,
    no_object_id_recompute,
    push_objects,
)
from compat.site_gate import Connection

from .audit import AuditLog
from .policy import Policy
from .reply import RefusedError, check

# What may be said of an app's error without a word of the app's.
_SAID = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "the ClientApp could not be loaded",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "the ClientApp raised an exception",
    ErrorCode.CLIENT_APP_CRASHED: "the ClientApp stopped responding",
}
_ERROR_CHARACTERS = 500
_NOTED_CHARACTERS = 1000
# Flower works on one message at a time; a few more may have failed before they could be answered.
_OPEN_QUESTIONS = 16


@dataclass
class _Question:
    """A message from the SuperLink that has not been answered yet."""

    message: Message
    size: int = 0


@dataclass
class _Arriving:
    """A reply of which not all objects are here yet."""

    question: _Question
    root: str
    runtime: float
    missing: set[str]
    size: int = 0
    objects: dict[str, bytes] = field(default_factory=dict)


class Gate:
    """Decides, and writes every decision down before it takes effect.

    Args:
        name: the SuperNode's, as the coordinator knows it.
        policy: what may run and what may leave.
        audit: where everything is written down.
        connection: to the SuperLink.
    """

    def __init__(self, name: str, policy: Policy, audit: AuditLog, connection: Connection) -> None:
        self._name, self._policy, self._audit, self._link = name, policy, audit, connection
        self._questions: dict[str, _Question] = {}
        self._runs: dict[int, Any] = {}
        self._arriving: dict[str, _Arriving] = {}
        self._pulling: _Question | None = None
        self._lock = threading.Lock()

    def guarded(self) -> Connection:
        """The connection with this gate in it."""
        return self._link._replace(
            receive=self._receive,
            send=self._send,
            get_run=self._get_run,
            get_fab=self._get_fab,
            pull_object=self._pull_object,
            push_object=self._push_object,
        )

    def _receive(self) -> tuple[Message, Any] | None:
        received = self._link.receive()
        if received is None:
            return None
        message, tree = received
        self._pulling = _Question(message)
        self._questions[message.metadata.message_id] = self._pulling
        while len(self._questions) > _OPEN_QUESTIONS:
            del self._questions[next(iter(self._questions))]
        self._note("message", **_about(message))
        return message, tree

    def _pull_object(self, run_id: int, object_id: str) -> bytes:
        content = self._link.pull_object(run_id, object_id)
        if self._pulling is not None:
            with self._lock:
                self._pulling.size += len(content)
        return content

    def _get_run(self, run_id: int) -> Any:
        run = self._link.get_run(run_id)
        self._runs[run_id] = run
        return run

    def _get_fab(self, fab_hash: str, run_id: int) -> Any:
        """Only an approved FAB gets any further: neither its config nor its code is looked at."""
        fab = self._link.get_fab(fab_hash, run_id)
        sha256 = hashlib.sha256(fab.content).hexdigest()
        run = self._runs.pop(run_id)
        facts = {
            "run": run_id,
            "fab": sha256,
            "bytes": len(fab.content),
            "overrides": _cut(json.dumps(dict(run.override_config))),
        }
        try:
            approval = self._check_fab(fab, sha256, run)
        except RefusedError as refused:
            self._note("fab", decision="refused", reason=refused.reason, **facts)
            self._refuse_message(refused)
        self._note("fab", decision="allowed", approved_by=approval, **facts)
        return fab

    def _check_fab(self, fab: Any, sha256: str, run: Any) -> str:
        approval = self._policy.approval(sha256)
        if approval is None:
            raise RefusedError(
                f"the FAB {sha256[:12]} is not approved here; `medfed site review` and "
                "`medfed site approve` are this hospital's to run"
            )
        if run.fab_hash != sha256:
            raise RefusedError("the run names another FAB than the one that was sent")
        # Flower looks the code up by what the coordinator says of it, not by what is in the FAB.
        try:
            named = fab_metadata(fab.content)
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise RefusedError("the FAB cannot be read", repr(error)) from None
        if (run.fab_id, run.fab_version) != named:
            raise RefusedError("the run names the FAB otherwise than the FAB itself")
        if run.primary_task_type == AGENT_APP:
            raise RefusedError("agents do not run here")
        return approval.approved_by

    def _refuse_message(self, refused: RefusedError) -> NoReturn:
        """Answer with an error, and make Flower forget the message."""
        question = self._pulling
        if question is None:
            raise RuntimeError("a FAB was asked for without a message")
        self._questions.pop(question.message.metadata.message_id, None)
        log(WARNING, "Site gate: refused: %s", refused.reason)
        self._deliver(self._error(question, ErrorCode.INVALID_FAB, refused.reason), 0.0)
        raise RunNotRunningException

    def _send(self, message: Message, tree: Any, runtime: float) -> tuple[set[str], str]:
        """Take the place of the SuperLink: ask for every object, send nothing yet."""
        question = self._questions.pop(message.metadata.reply_to_message_id, None)
        if question is None:
            self._note("reply", decision="dropped", reason="it answers no message that was asked")
            log(WARNING, "Site gate: dropped a reply to no message")
            return set(), ""
        if message.has_error():
            self._send_error(question, message.error, runtime)
            return set(), ""
        ids = {node.object_id for node in iterate_object_tree(tree)}
        root = tree.object_id
        self._arriving[root] = _Arriving(question, root, runtime, set(ids))
        return ids, root

    def _push_object(self, run_id: int, session_id: str, object_id: str, content: bytes) -> None:
        """Keep one object; with the last one, decide and send. Called from several threads."""
        del run_id
        with self._lock:
            arriving = self._arriving[session_id]
            arriving.missing.discard(object_id)
            arriving.size += len(content)
            # What is too much already is counted, and not kept.
            if arriving.size <= self._policy.reply.max_bytes:
                arriving.objects[object_id] = content
            if arriving.missing:
                return
            del self._arriving[session_id]
        self._send_reply(arriving)

    def _send_reply(self, arriving: _Arriving) -> None:
        question, limits = arriving.question, self._policy.reply
        facts = {
            **_about(question.message),
            "bytes_in": question.size,
            "bytes_out": arriving.size,
        }
        try:
            if arriving.size > limits.max_bytes:
                raise RefusedError(
                    f"expected at most {limits.max_bytes} bytes, found {arriving.size}"
                )
            kind = question.message.metadata.message_type
            checked = check(limits, kind, arriving.root, arriving.objects)
        except RefusedError as refused:
            log(WARNING, "Site gate: withheld a reply: %s %s", refused.reason, refused.detail)
            self._note(
                "reply", decision="refused", reason=refused.reason, detail=refused.detail, **facts
            )
            reason = f"its reply was withheld: {refused.reason}"
            error = self._error(question, ErrorCode.MOD_FAILED_PRECONDITION, reason)
            self._deliver(error, arriving.runtime)
            return
        reply = identified(Message(checked.content, reply_to=question.message))
        self._note(
            "reply",
            decision="released",
            reply=reply.metadata.message_id,
            norm=checked.norm,
            metrics=checked.metrics,
            **facts,
        )
        self._deliver(reply, arriving.runtime)

    def _send_error(self, question: _Question, error: Error, runtime: float) -> None:
        code = error.code if error.code in _SAID else ErrorCode.UNKNOWN
        said = _SAID.get(code, "the ClientApp gave an error")
        text = str(error.reason or "")[:_ERROR_CHARACTERS]
        reason = text if self._policy.reply.error_text else f"{said}; its words stay here"
        self._note("reply", decision="error", reason=said, detail=text, **_about(question.message))
        self._deliver(self._error(question, code, reason, gate=False), runtime)

    def _error(self, question: _Question, code: int, reason: str, gate: bool = True) -> Message:
        told = f"site gate of {self._name}: {reason}" if gate else reason
        return identified(Message(Error(code=code, reason=told), reply_to=question.message))

    def _deliver(self, message: Message, runtime: float) -> None:
        """Send a message of the gate's own."""
        with no_object_id_recompute():
            objects = get_all_nested_objects(message)
            ids, session = self._link.send(message, get_object_tree(message), runtime)
            push_objects(
                objects,
                lambda key, content: self._link.push_object(
                    message.metadata.run_id, session, key, content
                ),
                object_ids_to_push=ids,
            )

    def _note(self, event: str, **facts: Any) -> None:
        """Write it down; a SuperNode that cannot is stopped before it does anything more."""
        try:
            self._audit.append(event, **facts)
        except (OSError, SuperNodeError) as error:
            log(ERROR, "Site gate: stopping, the audit log cannot be written: %s", error)
            os.kill(os.getpid(), signal.SIGTERM)
            raise


def _about(message: Message) -> dict[str, Any]:
    about = message.metadata
    return {
        "run": about.run_id,
        "message": about.message_id,
        "type": _cut(about.message_type),
        "round": _cut(about.group_id),
    }


def _cut(text: str) -> str:
    """What the coordinator wrote, in a length that a line of the log should have."""
    return text if len(text) <= _NOTED_CHARACTERS else f"{text[:_NOTED_CHARACTERS]}…"
