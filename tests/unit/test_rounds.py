"""Rounds: seed and name decide who trains and in which order replies are summed."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedTrimmedAvg, Krum
from flwr.supercore.task_identity import TaskIdentity

from app.adapter import Manifest, digest
from app.communication import Communication
from app.errors import AppError
from app.institutions import Institutions
from app.record import RunRecord
from app.rounds import SeededFedAvg, SeededSampling, run_round


class FakeGrid:
    """Nodes that answer at once, in an order of their own."""

    def __init__(self, names, *, train=None, named=True, shuffle_seed=0):
        self.rng = random.Random(shuffle_seed)
        ids = self.rng.sample(range(10**6, 10**9), len(names))
        self.node_ids = dict(zip(names, ids, strict=True))
        self.named = named
        self.train = train
        self.queries = 0
        self.mail = []

    def get_nodes(self):
        nodes = [
            SimpleNamespace(node_id=node_id, name=name if self.named else "")
            for name, node_id in self.node_ids.items()
        ]
        self.rng.shuffle(nodes)
        return nodes

    def push_messages(self, messages):
        answers = [self._answer(message) for message in messages]
        self.mail += [answer for answer in answers if answer is not None]
        self.rng.shuffle(self.mail)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        wanted = [m for m in self.mail if m.metadata.reply_to_message_id in message_ids]
        self.mail = []
        return wanted

    def _answer(self, message):
        name = next(n for n, i in self.node_ids.items() if i == message.metadata.dst_node_id)
        message.metadata.__dict__["_message_id"] = f"message-to-{name}"
        if message.metadata.message_type == "query":
            self.queries += 1
            identity = ConfigRecord({"partition-id": int(name.split("-")[1])})
            return Message(RecordDict({"identity": identity}), reply_to=message)
        return self.train(name, message)


def reply(message, values, *, examples=10, loss=1.0):
    arrays = ArrayRecord({"adapter": Array(np.asarray(values, dtype=np.float32))})
    metrics = MetricRecord({"num-examples": examples, "train-loss": loss})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


MANIFEST = Manifest((("a", (2,)), ("b", (1,))))
NAMES = [f"supernode-{n:02d}" for n in range(20)]


@pytest.fixture(autouse=True)
def inside_a_run_without_roster(monkeypatch):
    monkeypatch.delenv("MEDFED_INSTITUTIONS", raising=False)
    for attribute in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, attribute, 1)


def strategy_on(grid, **options):
    settings = {"seed": 42, "sample_size": 2, "fraction_evaluate": 0.0, **options}
    return SeededFedAvg(institutions=Institutions(grid), **settings)


def sampled(grid, rounds, **options):
    strategy = strategy_on(grid, **options)
    chosen = []
    for n in range(1, rounds + 1):
        arrays = ArrayRecord({"adapter": Array(np.zeros(3, np.float32))})
        list(strategy.configure_train(n, arrays, ConfigRecord(), grid))
        chosen.append(list(strategy.asked.values()))
    return chosen


def test_the_same_seed_asks_the_same_institutions_whatever_their_node_ids():
    one = sampled(FakeGrid(NAMES, shuffle_seed=1), 50)
    other = sampled(FakeGrid(NAMES, shuffle_seed=2), 50)
    assert one == other


def test_another_seed_asks_others():
    assert sampled(FakeGrid(NAMES), 50) != sampled(FakeGrid(NAMES), 50, seed=43)


def test_every_institution_gets_its_turn():
    assert {name for pair in sampled(FakeGrid(NAMES), 100) for name in pair} == set(NAMES)


def test_a_simulation_without_names_asks_each_node_once_for_its_partition():
    grid = FakeGrid(NAMES, named=False)
    assert sampled(grid, 50) == sampled(FakeGrid(NAMES), 50)
    assert grid.queries == 20


def test_an_institution_that_is_offline_gives_its_place_to_the_next_in_order(monkeypatch):
    monkeypatch.setenv("MEDFED_INSTITUTIONS", ",".join(NAMES))
    everyone = Institutions(FakeGrid(NAMES)).order(42, 1)
    absent = everyone[0]
    grid = FakeGrid([name for name in NAMES if name != absent])
    assert sampled(grid, 1) == [sorted(everyone[1:3])]


def one_round(grid, strategy, folder):
    record = RunRecord(folder)
    communication = Communication(folder / "comm_cost.txt")
    arrays = ArrayRecord({"adapter": Array(np.zeros(3, np.float32))})
    return run_round(grid, strategy, record, 1, arrays, MANIFEST, communication)


def run(grid, tmp_path, **options):
    strategy = strategy_on(grid, **options)
    result = one_round(grid, strategy, tmp_path)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    return result, events


def test_the_average_does_not_depend_on_the_order_of_arrival(tmp_path):
    values = {name: np.random.default_rng(n).normal(size=3) for n, name in enumerate(NAMES)}
    results = set()
    for seed in range(5):
        grid = FakeGrid(NAMES, train=lambda n, m: reply(m, values[n]), shuffle_seed=seed)
        result, _ = run(grid, tmp_path / str(seed), sample_size=20)
        results.add(result.flat.tobytes())
    assert len(results) == 1


def test_the_average_is_weighted_by_examples(tmp_path):
    weights = {"supernode-00": 1, "supernode-01": 3}
    grid = FakeGrid(
        list(weights),
        train=lambda n, m: reply(m, [weights[n]] * 3, examples=weights[n], loss=weights[n]),
    )
    result, events = run(grid, tmp_path)
    assert result.flat.tolist() == [2.5, 2.5, 2.5]
    assert result.train_loss == 2.5
    assert [e["institution"] for e in events if e["event"] == "reply"] == sorted(weights)


@pytest.mark.parametrize("flower", [FedAvg, FedAdam, FedMedian, FedTrimmedAvg, Krum])
def test_flowers_own_strategies_work_on_the_flat_adapter(tmp_path, flower):
    class Seeded(SeededSampling, flower):
        pass

    values = {name: np.full(3, number, np.float32) for number, name in enumerate(NAMES[:5])}
    grid = FakeGrid(NAMES[:5], train=lambda n, m: reply(m, values[n]))
    options = {"num_malicious_nodes": 1} if flower is Krum else {}
    strategy = Seeded(
        institutions=Institutions(grid), seed=1, sample_size=5, fraction_evaluate=0.0, **options
    )
    strategy.current_arrays = {"adapter": np.zeros(3, np.float32)}  # FedAdam steps from here
    adapter = one_round(grid, strategy, tmp_path).flat
    assert adapter.shape == (3,)
    assert np.isfinite(adapter).all()
    assert adapter.any()


def test_bytes_are_counted_in_both_directions_as_the_leaderboard_does(tmp_path):
    grid = FakeGrid(NAMES[:2], train=lambda n, m: reply(m, [0, 0, 0]))
    _, events = run(grid, tmp_path)
    one = len(Array(np.zeros(3, np.float32)).data)
    assert [e["bytes"] for e in events if e["event"] == "round-finished"] == [4 * one]


def test_each_reply_and_each_round_carry_the_digest_of_their_adapter(tmp_path):
    values = {name: np.full(3, n, np.float32) for n, name in enumerate(NAMES[:2])}
    grid = FakeGrid(NAMES[:2], train=lambda n, m: reply(m, values[n]))
    result, events = run(grid, tmp_path)
    replies = {e["institution"]: e for e in events if e["event"] == "reply"}
    for name, adapter in values.items():
        assert replies[name]["adapter_sha256"] == digest(adapter)
        digests = digest(adapter[:2])[:8] + digest(adapter[2:])[:8]
        assert replies[name]["tensor_digests"] == digests
    (finished,) = [e for e in events if e["event"] == "round-finished"]
    assert finished["adapter_sha256"] == digest(result.flat)


def test_an_institution_that_fails_is_named_and_the_round_goes_on(tmp_path):
    def train(name, message):
        if name == "supernode-00":
            reason = "<class 'app.errors.AppError'>:<'no cards'>"
            return Message(Error(code=1, reason=reason), reply_to=message)
        return reply(message, [1, 1, 1])

    result, events = run(FakeGrid(NAMES[:2], train=train), tmp_path)
    assert result.flat.tolist() == [1, 1, 1]
    failed = [event for event in events if event["event"] == "reply-failed"]
    assert [(e["institution"], e["reason"]) for e in failed] == [("supernode-00", "no cards")]


def test_an_error_in_the_superlinks_own_name_is_still_told_of_the_institution(tmp_path):
    def train(name, message):
        if name == "supernode-01":
            gone = Message(Error(code=3, reason="node unavailable"), reply_to=message)
            gone.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's
            return gone
        return reply(message, [1, 1, 1])

    _, events = run(FakeGrid(NAMES[:2], train=train), tmp_path)
    failed = [event["institution"] for event in events if event["event"] == "reply-failed"]
    assert failed == ["supernode-01"]
    assert not [event for event in events if event["event"] == "reply-missing"]


def test_a_round_without_a_single_reply_ends_the_run_with_the_names(tmp_path, monkeypatch):
    monkeypatch.setattr("app.rounds.ROUND_TIMEOUT_S", 0.0)
    grid = FakeGrid(NAMES[:2], train=lambda n, m: None)
    with pytest.raises(AppError, match="supernode-00, supernode-01"):
        run(grid, tmp_path)


def test_a_loss_that_is_not_a_number_ends_the_run(tmp_path):
    grid = FakeGrid(NAMES[:2], train=lambda n, m: reply(m, [0, 0, 0], loss=float("nan")))
    with pytest.raises(AppError, match="finite training loss"):
        run(grid, tmp_path)


def test_too_few_institutions_online_says_how_many_and_which_are_missing(monkeypatch):
    monkeypatch.setenv("MEDFED_INSTITUTIONS", ",".join(NAMES[:4]))
    institutions = Institutions(FakeGrid(NAMES[:2]))
    waits = []
    with pytest.raises(AppError) as caught:
        institutions.wait_for(lambda _: 3, 0.0, lambda now, needed: waits.append((now, needed)))
    assert "needs 3 institutions, 2 are online, 1 missing" in str(caught.value)
    assert "supernode-02, supernode-03" in str(caught.value)
    assert waits == [(2, 3)]


def test_enough_institutions_online_do_not_wait():
    online = Institutions(FakeGrid(NAMES)).wait_for(lambda n: n, 0.0, lambda *_: None)
    assert list(online) == NAMES
