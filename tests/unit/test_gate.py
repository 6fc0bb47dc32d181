"""Where the gate stands in Flower's SuperNode, and what passes it there."""

from __future__ import annotations

import hashlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import RunNotRunningException

import compat
from common.errors import SuperNodeError
from compat import hooks, site_gate
from compat.digests import differences
from supernode.__main__ import main
from supernode.gate import audit, policy
from supernode.gate import gate as hook
from supernode.gate.install import install
from supernode.gate.site import Site
from tests.e2e.warm_federation import write_app

SIZE = 20
SECRET = "Patient 4711 has"
RUN = 12


@pytest.fixture(scope="module")
def fab(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from flwr.cli.build import build_fab_from_disk

    return build_fab_from_disk(write_app(tmp_path_factory.mktemp("app") / "small"))


class SuperLink:
    """The SuperLink's end of the connection: asks one question, keeps all that reaches it."""

    def __init__(self, fab: bytes, **run: Any) -> None:
        self.fab = fab
        digest = hashlib.sha256(fab).hexdigest()
        about = {"fab_id": "tests/small", "fab_version": "1.0.0", "fab_hash": digest}
        told = {"override_config": {"rounds": 1}, "primary_task_type": TaskType.SERVER_APP}
        self.run = SimpleNamespace(**{**about, **told, **run})
        self.sent: list[Message] = []
        self.pushed: dict[str, bytes] = {}

    def question(self) -> tuple[Message, Any]:
        metadata = Metadata(RUN, "", 1, 2, "", "3", 1e9, 1e9, "train")
        message = Message(RecordDict(), metadata=metadata)
        metadata.__dict__["_message_id"] = message.object_id
        return message, get_object_tree(message)

    def send(self, message: Message, tree: Any, runtime: float) -> tuple[set[str], str]:
        self.sent.append(message)
        return {tree.object_id} | {child.object_id for child in _all(tree)}, "session"

    def connection(self) -> hook.Connection:
        return hook.Connection(
            node_id=2,
            receive=self.question,
            send=self.send,
            get_run=lambda run_id: self.run,
            get_fab=lambda sha256, run_id: Fab("", self.fab, {}),
            pull_object=lambda run_id, key: b"12345",
            push_object=lambda run_id, session, key, content: self.pushed.update({key: content}),
            confirm_message_received=lambda run_id, key: None,
        )

    @property
    def bytes(self) -> bytes:
        """All that ever left the hospital."""
        return b"".join(self.pushed.values()) + repr(self.sent).encode()


def _all(tree: Any) -> list[Any]:
    return [one for child in tree.children for one in (child, *_all(child))]


class Hospital:
    """A SuperNode with a gate, as far as the connection sees it."""

    def __init__(self, folder: Path, superlink: SuperLink, approved: bytes, **limits: Any) -> None:
        self.folder = folder
        about = {"parameters": SIZE, "dtype": "float32", "max_norm": 100.0, "max_bytes": 2000}
        reply = policy.ReplyLimits(**{**about, "metrics": ("train-loss",), **limits})
        digest = hashlib.sha256(approved).hexdigest()
        approval = policy.Approval(digest, "Dr. A", policy.datetime.now(policy.UTC))
        rules = policy.Policy(reply, (approval,), "00" * 8)
        self.audit = audit.AuditLog(folder)
        gate = hook.Gate("supernode-07", rules, self.audit, superlink.connection())
        self.link = gate.guarded()

    def ask(self) -> Message:
        """Take a message as Flower's `_pull_and_store_message` does."""
        message, _ = self.link.receive()
        run = self.link.get_run(RUN)
        self.link.get_fab(run.fab_hash, RUN)
        self.link.pull_object(RUN, message.metadata.message_id)
        return message

    def answer(self, message: Message, content: RecordDict | Error) -> None:
        """Reply as Flower's `_push_messages` does."""
        reply = Message(content, reply_to=message)
        ids, session = self.link.send(reply, get_object_tree(reply), 1.5)
        for key, one in get_all_nested_objects(reply).items():
            if key in ids:
                self.link.push_object(RUN, session, key, one.deflate())

    def log(self) -> list[dict[str, Any]]:
        audit.verify(self.folder)
        return list(audit.entries(self.folder))


def content(**changes: Any) -> RecordDict:
    adapter = ArrayRecord({"adapter": Array(np.ones(SIZE, np.float32))})
    return RecordDict({"arrays": adapter, "metrics": MetricRecord({"train-loss": 0.5}), **changes})


@pytest.fixture
def superlink(fab: bytes) -> SuperLink:
    return SuperLink(fab)


@pytest.fixture
def hospital(tmp_path: Path, superlink: SuperLink, fab: bytes) -> Hospital:
    return Hospital(tmp_path, superlink, fab)


# --- what may run ---------------------------------------------------------------------------------


def test_an_approved_fab_is_handed_on(hospital, superlink, fab):
    hospital.link.receive()
    run = hospital.link.get_run(RUN)
    assert hospital.link.get_fab(run.fab_hash, RUN).content == fab
    assert superlink.sent == []
    fact = hospital.log()[1]
    assert (fact["event"], fact["decision"], fact["approved-by"]) == ("fab", "allowed", "Dr. A")
    assert (fact["fab"], fact["bytes"]) == (run.fab_hash, len(fab))
    assert fact["overrides"] == '{"rounds": 1}'


def test_an_approved_file_that_is_no_fab_is_refused(tmp_path):
    superlink = SuperLink(b"no fab")
    with pytest.raises(RunNotRunningException):
        Hospital(tmp_path, superlink, b"no fab").ask()
    assert "the FAB cannot be read" in superlink.sent[0].error.reason


@pytest.mark.parametrize(
    ("run", "approve", "reason"),
    [
        ({}, lambda fab: b"another", "is not approved here"),
        ({}, lambda fab: fab[:-1] + bytes([fab[-1] ^ 1]), "is not approved here"),
        ({"fab_hash": "ab" * 32}, lambda fab: fab, "names another FAB"),
        ({"fab_id": "tests/other"}, lambda fab: fab, "than the FAB itself"),
        ({"fab_version": "1/../../../data"}, lambda fab: fab, "than the FAB itself"),
        ({"primary_task_type": TaskType.AGENT_APP}, lambda fab: fab, "agents do not run"),
    ],
)
def test_no_other_fab_gets_any_further(tmp_path, fab, run, approve, reason):
    superlink = SuperLink(fab, **run)
    hospital = Hospital(tmp_path, superlink, approve(fab))
    with pytest.raises(RunNotRunningException):  # what makes Flower forget the message
        hospital.ask()
    (told,) = superlink.sent
    assert told.error.code == ErrorCode.INVALID_FAB
    assert told.error.reason.startswith("site gate of supernode-07: ")
    assert reason in told.error.reason
    assert told.metadata.reply_to_message_id == superlink.question()[0].metadata.message_id
    assert list(superlink.pushed) == [told.metadata.message_id]
    assert hospital.log()[-1]["decision"] == "refused"
    assert reason in hospital.log()[-1]["reason"]


# --- what may leave -------------------------------------------------------------------------------


def test_an_allowed_reply_leaves_as_the_gate_built_it(hospital, superlink):
    hospital.answer(hospital.ask(), content())
    (reply,) = superlink.sent
    assert reply.content == content()
    assert set(superlink.pushed) == set(get_all_nested_objects(reply))
    fact = hospital.log()[-1]
    assert (fact["event"], fact["decision"]) == ("reply", "released")
    assert fact["reply"] == reply.metadata.message_id
    assert (fact["round"], fact["run"], fact["bytes-in"]) == ("3", RUN, 5)
    assert fact["metrics"] == {"train-loss": 0.5}
    assert fact["norm"] == pytest.approx(SIZE**0.5)


def test_a_refused_reply_becomes_an_error_that_says_so(hospital, superlink):
    hospital.answer(hospital.ask(), content(rows=MetricRecord({SECRET: 1})))
    (reply,) = superlink.sent
    assert reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION
    assert "its reply was withheld: expected arrays and metrics" in reply.error.reason
    assert SECRET.encode() not in superlink.bytes
    assert list(superlink.pushed) == [reply.metadata.message_id]
    fact = hospital.log()[-1]
    assert fact["decision"] == "refused"
    assert "rows" in fact["detail"]


def test_the_node_lives_on_after_a_refusal(hospital, superlink):
    hospital.answer(hospital.ask(), RecordDict())
    hospital.answer(hospital.ask(), content())
    assert [reply.has_error() for reply in superlink.sent] == [True, False]


def test_nothing_is_sent_before_the_whole_reply_was_seen(hospital, superlink):
    reply = Message(content(), reply_to=hospital.ask())
    ids, session = hospital.link.send(reply, get_object_tree(reply), 1.5)
    objects = get_all_nested_objects(reply)
    assert ids == set(objects)
    *most, last = ids
    for key in most:
        hospital.link.push_object(RUN, session, key, objects[key].deflate())
    assert superlink.sent == []
    hospital.link.push_object(RUN, session, last, objects[last].deflate())
    assert len(superlink.sent) == 1


def test_an_endless_reply_is_counted_and_not_kept(hospital, superlink):
    big = ArrayRecord({"adapter": Array(np.zeros(10_000, np.float32))})
    hospital.answer(hospital.ask(), content(arrays=big))
    assert "expected at most 2000 bytes" in superlink.sent[0].error.reason


def test_the_words_of_an_apps_error_stay_here(hospital, superlink):
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"cannot read {SECRET}")
    hospital.answer(hospital.ask(), error)
    assert (
        superlink.sent[0].error.reason == "the ClientApp raised an exception; its words stay here"
    )
    assert SECRET.encode() not in superlink.bytes
    assert SECRET in hospital.log()[-1]["detail"]


def test_the_words_of_an_apps_error_leave_where_the_policy_says_so(tmp_path, superlink, fab):
    hospital = Hospital(tmp_path, superlink, fab, error_text=True)
    hospital.answer(hospital.ask(), Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "x" * 10_000))
    assert superlink.sent[0].error.reason == "x" * 500


def test_an_errors_code_is_one_of_flowers(hospital, superlink):
    hospital.answer(hospital.ask(), Error(int.from_bytes(b"4711", "big"), SECRET))
    assert superlink.sent[0].error.code == ErrorCode.UNKNOWN


def test_there_is_one_answer_to_a_message(hospital, superlink):
    message = hospital.ask()
    hospital.answer(message, content())
    hospital.answer(message, content())
    assert len(superlink.sent) == 1
    assert hospital.log()[-1]["decision"] == "dropped"


def test_a_reply_says_of_itself_what_the_message_said(hospital, superlink):
    """Group, type and addressee are taken from the message: an app could write anything there."""
    reply = Message(content(), reply_to=hospital.ask())
    reply.metadata.__dict__.update(_group_id=SECRET, _message_type=SECRET, _dst_node_id=99)
    ids, session = hospital.link.send(reply, get_object_tree(reply), 1.5)
    for key, one in get_all_nested_objects(reply).items():
        assert key in ids
        hospital.link.push_object(RUN, session, key, one.deflate())
    assert superlink.sent[0].metadata.group_id == "3"
    assert superlink.sent[0].metadata.dst_node_id == 1
    assert SECRET.encode() not in superlink.bytes


def test_without_a_log_nothing_happens(hospital, superlink, monkeypatch):
    stopped: list[tuple[int, int]] = []
    monkeypatch.setattr(hook.os, "kill", lambda *told: stopped.append(told))
    message = hospital.ask()

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit.os, "write", full)
    with pytest.raises(OSError, match="No space"):
        hospital.answer(message, content())
    assert superlink.sent == []
    assert len(stopped) == 1


# --- in Flower ------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Site:
    policy.create(tmp_path / "site" / "policy.toml", "supernode-07")
    return Site.at(tmp_path / "site")


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    from flwr.supernode import start_client_internal

    monkeypatch.setattr(
        start_client_internal, "_init_connection", start_client_internal._init_connection
    )
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    return start_client_internal


def changed(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    """A Flower in which one function is another."""
    import importlib

    def other() -> None:
        """Another."""

    monkeypatch.setattr(importlib.import_module(module), name, other)


WORKER = "flwr.supernode.start_client_internal"


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module, names in site_gate.HOOK.pins.items() for name in names],
)
def test_a_flower_that_has_changed_where_the_gate_stands_does_not_start(
    monkeypatch, flower, site, module, name
):
    changed(monkeypatch, module, name)
    before = flower._init_connection
    with pytest.raises(SuperNodeError, match=f"expected {module}.{name} as in flwr") as refused:
        install("supernode-07", site)
    assert "flwr 1.41.0 and 1.42.0 are known to it" in refused.value.hint
    assert flower._init_connection is before
    assert not site.audit.exists()


def test_a_flower_without_a_name_that_the_gate_uses_does_not_start(monkeypatch, flower, site):
    monkeypatch.delitem(sys.modules, "compat.messages")
    monkeypatch.delattr(compat, "messages")
    monkeypatch.setitem(sys.modules, "flwr.supercore.run", None)
    with pytest.raises(SuperNodeError, match=r"found: import of flwr\.supercore\.run halted"):
        install("supernode-07", site)
    assert not site.audit.exists()


def test_a_flower_that_has_changed_elsewhere_starts_with_its_gate(monkeypatch, flower, site):
    changed(monkeypatch, "flwr.supercore.superexec.run_superexec", "run_superexec")
    monkeypatch.setattr(hooks.metadata, "version", lambda _name: "1.99.0")
    install("supernode-07", site)
    assert differences({WORKER: {"_init_connection": "800f9aba73646ea2"}}) == []


def test_the_other_hooks_still_find_the_flower_that_they_know(flower, site):
    install("supernode-07", site)
    assert hooks.report("supernode").off == ()


def test_the_connection_goes_through_the_gate(monkeypatch, flower, site, superlink):
    @contextmanager
    def connect(*_: Any):
        yield superlink.connection()

    monkeypatch.setattr(flower, "http_request_response", connect)
    install("supernode-07", site)
    with flower._init_connection(server_address="127.0.0.1:1", insecure=True) as connection:
        node_id, receive, _, get_run, get_fab, *_ = connection
        assert node_id == 2
        receive()
        with pytest.raises(RunNotRunningException):
            get_fab(get_run(RUN).fab_hash, RUN)
    assert "is not approved here" in superlink.sent[0].error.reason
    assert [entry["event"] for entry in audit.entries(site.audit)] == ["started", "message", "fab"]


def test_apps_installed_before_are_installed_anew(flower, site, tmp_path):
    """Flower looks an installed app up by eight digits of its hash."""
    stale = tmp_path / "flwr" / "apps" / "medfed.medfed.0.1.0.12345678"
    stale.mkdir(parents=True)
    install("supernode-07", site)
    assert not stale.exists()


def test_a_policy_with_an_error_stops_the_start(site, flower):
    site.policy.write_text("[reply]\nparameters = 0\n")
    with pytest.raises(SuperNodeError, match=r"policy.toml:2: \[reply\] parameters"):
        install("supernode-07", site)


# --- the command ----------------------------------------------------------------------------------


def start(monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    from supernode import preflight

    monkeypatch.setattr(preflight, "check", lambda settings: None)

    def reached(settings: Any) -> None:
        raise SuperNodeError("reached the SuperLink")

    monkeypatch.setattr(preflight, "wait_for_superlink", reached)
    common = ["--name=supernode-07", "--superlink=a:1", "--ca=ca", "--key=key", "--data=data"]
    return main([*common, *more])


def test_without_a_gate_that_is_said(monkeypatch, capsys):
    assert start(monkeypatch) == 1
    assert "warning: supernode-07 has no site gate (--site)" in capsys.readouterr().err


def test_a_site_without_a_policy_does_not_start(monkeypatch, capsys, tmp_path):
    assert start(monkeypatch, f"--site={tmp_path}") == 1
    told = capsys.readouterr().err
    assert "found no such file" in told
    assert "reached the SuperLink" not in told


def test_the_audit_log_may_be_elsewhere(monkeypatch, capsys, flower, site, tmp_path):
    assert start(monkeypatch, f"--site={site.folder}", f"--audit={tmp_path / 'audit'}") == 1
    assert "reached the SuperLink" in capsys.readouterr().err
    assert audit.verify(tmp_path / "audit").lines == 1
    (entry,) = audit.entries(tmp_path / "audit")
    assert entry["policy"] == hashlib.sha256(site.policy.read_bytes()).hexdigest()


def test_an_audit_log_needs_a_gate(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        start(monkeypatch, "--audit=audit")
    assert "without --site" in capsys.readouterr().err
