"""A grid without Flower: nodes that reply, are slow, fall silent or go, in seconds of its own."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from tests.fake_clock import Clock

NAMES = [f"supernode-{n:02d}" for n in range(20)]


@dataclass
class Node:
    """A SuperNode as the SuperLink sees it."""

    node_id: int
    online: bool = True
    silent_since: float | None = None
    activated: str = "2026-01-01T00:00:00"


class FakeGrid:
    """Nodes that answer, in an order of their own.

    ``train(name, message)`` gives a reply, ``None`` for none, or ``(seconds, reply)`` for a later
    one; by default a reply of zeros. ``at(seconds, what)`` lets something happen then.
    """

    def __init__(self, names=NAMES, *, train=None, named=True, shuffle_seed=0, clock=None):
        self.rng = random.Random(shuffle_seed)
        self.clock = clock or Clock(1000.0)
        ids = self.rng.sample(range(10**6, 10**9), len(names))
        self.nodes = {name: Node(node_id) for name, node_id in zip(names, ids, strict=True)}
        self.named = named
        self.train = train or (lambda name, message: reply(message, [0, 0, 0]))
        self.queries = 0
        self.asked = []
        self._mail = []  # (when, reply)
        self._plans = []  # (when, what)
        self._numbers = itertools.count()

    def at(self, seconds, what):
        self._plans.append((self.clock.now + seconds, what))

    def get_nodes(self):
        self._happen()
        nodes = [
            SimpleNamespace(
                node_id=node.node_id,
                name=name if self.named else "",
                online_until=(self.clock.now if node.silent_since is None else node.silent_since)
                + 20,
                last_activated_at=node.activated,
            )
            for name, node in self.nodes.items()
            if node.online
        ]
        self.rng.shuffle(nodes)
        return nodes

    def push_messages(self, messages):
        self._happen()
        ids = []
        for message in messages:
            name = next(
                n for n, node in self.nodes.items() if node.node_id == message.metadata.dst_node_id
            )
            ids.append(f"message-{next(self._numbers)}-to-{name}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            answer = self._answer(name, message)
            if answer is not None:
                wait, answer = answer if isinstance(answer, tuple) else (0.0, answer)
                self._mail.append((self.clock.now + wait, answer))
        self.rng.shuffle(self._mail)
        return ids

    def pull_messages(self, message_ids):
        self._happen()
        there = [
            (when, mail)
            for when, mail in self._mail
            if when <= self.clock.now and mail.metadata.reply_to_message_id in message_ids
        ]
        for entry in there:
            self._mail.remove(entry)
        return [mail for _, mail in there]

    def _answer(self, name, message):
        if message.metadata.message_type == "query":
            self.queries += 1
            identity = ConfigRecord({"partition-id": int(name.split("-")[1])})
            return Message(RecordDict({"identity": identity}), reply_to=message)
        self.asked.append(name)
        return self.train(name, message)

    def _happen(self):
        due = [plan for plan in self._plans if plan[0] <= self.clock.now]
        for plan in due:
            self._plans.remove(plan)
            plan[1]()


def inside_a_run(monkeypatch):
    """Let Flower's messages be made as in a ServerApp, and no roster be known."""
    monkeypatch.delenv("MEDFED_INSTITUTIONS", raising=False)
    for attribute in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, attribute, 1)


def reply(message, values, *, examples=10, loss=1.0, **more):
    arrays = ArrayRecord({"adapter": Array(np.asarray(values, dtype=np.float32))})
    metrics = MetricRecord({"num-examples": examples, "train-loss": loss, **more})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def error(message, code, reason="broken"):
    return Message(Error(code=code, reason=reason), reply_to=message)
