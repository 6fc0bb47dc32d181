"""Flower's strategies on the flat adapter: one config word away, and with a memory that is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedProx

from app.config import STRATEGIES
from app.errors import AppError
from app.server.institutions import Institutions
from app.server.reply_checks import Accepted
from app.server.strategies import SeededSampling, strategy
from tests.fake_grid import NAMES, FakeGrid, inside_a_run
from tests.run_configs import default_config

SETTINGS = default_config().strategy


@pytest.fixture(autouse=True)
def run_without_roster(monkeypatch):
    inside_a_run(monkeypatch)


def replies(*values):
    metrics = {"num-examples": 10, "train-loss": 1.0}
    return [Accepted(np.full(3, v, np.float32), metrics, 0.0).message() for v in values]


def adapter_of(arrays):
    return arrays["adapter"].numpy()


@pytest.mark.parametrize(
    ("name", "expected"), [("FedMedian", 1.0), ("FedTrimmedAvg", 1.0), ("Krum", 1.0)]
)
def test_one_poisoned_reply_of_five_does_not_move_a_robust_strategy(name, expected):
    chosen = strategy(replace(SETTINGS, name=name, min_train_nodes=5), institutions(), seed=1)
    arrays, _ = chosen.aggregate_train(1, replies(1, 1, 1, 1, 1e6))
    assert adapter_of(arrays).tolist() == [expected] * 3


def test_the_same_reply_wins_under_plain_averaging():
    arrays, _ = strategy(SETTINGS, institutions(), seed=1).aggregate_train(1, replies(1, 1e6))
    assert adapter_of(arrays).max() > 1e5


@pytest.mark.parametrize("name", [name for name, least in STRATEGIES.items() if least > 2])
def test_a_robust_strategy_with_too_few_replies_says_so_at_the_start(name):
    with pytest.raises(AppError, match=f"{name} expects at least {STRATEGIES[name]}"):
        strategy(replace(SETTINGS, name=name), institutions(), seed=1)


def institutions():
    found = Institutions(FakeGrid())
    found.online()
    return found


def mixed(flower, **options):
    class Seeded(SeededSampling, flower):
        pass

    return Seeded(institutions=institutions(), seed=1, sample_size=2, **options)


def step(chosen, number, before, *values):
    """One round of a strategy: what it sends out, what it makes of the replies."""
    arrays = ArrayRecord({"adapter": Array(np.full(3, before, np.float32))})
    nodes = [one.node_id for one in chosen.institutions.online().values()][:2]
    sent = chosen.messages(number, arrays, ConfigRecord(), nodes)
    assert [message.metadata.dst_node_id for message in sent] == nodes
    aggregated, _ = chosen.aggregate_train(number, replies(*values))
    return adapter_of(aggregated)


@pytest.mark.parametrize(
    ("flower", "options"), [(FedAdam, {}), (FedAvgM, {"server_momentum": 0.9})]
)
def test_a_strategy_with_a_memory_goes_on_bit_for_bit(flower, options):
    undisturbed, died = mixed(flower, **options), mixed(flower, **options)
    for chosen in (undisturbed, died):
        step(chosen, 1, 0.0, 1.0, 2.0)
    state = died.state()
    assert state
    resumed = mixed(flower, **options)
    resumed.restore(state)
    second = (2, 1.5, 2.0, 4.0)
    expected = step(undisturbed, *second).tobytes()
    assert step(resumed, *second).tobytes() == expected
    # And it is the memory that does it.
    assert step(mixed(flower, **options), *second).tobytes() != expected


def test_what_a_strategy_adds_to_its_messages_is_sent():
    chosen = mixed(FedProx, proximal_mu=0.5)
    nodes = [one.node_id for one in chosen.institutions.online().values()][:1]
    (message,) = chosen.messages(
        1, ArrayRecord({"adapter": Array(np.zeros(3, np.float32))}), ConfigRecord(), nodes
    )
    assert message.content["config"]["proximal-mu"] == 0.5
    assert message.content["config"]["server-round"] == 1


def test_who_is_quarantined_is_not_in_the_order():
    chosen = strategy(SETTINGS, institutions(), seed=1)
    chosen.quarantined.add(NAMES[3])
    assert sorted(chosen.order(1)) == [name for name in NAMES if name != NAMES[3]]
