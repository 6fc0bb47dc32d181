"""Replies are checked before they are summed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from app.adapter.layout import Manifest
from app.server.reply_checks import _ADAM_STEP, BadReplyError, ReplyChecks
from app.training import loop
from tests.fake_grid import inside_a_run
from tests.run_configs import default_config

MANIFEST = Manifest((("a", (100,)),))
CONFIG = default_config()
BEFORE = np.zeros(100, np.float32)


@pytest.fixture(autouse=True)
def run_without_roster(monkeypatch):
    inside_a_run(monkeypatch)


def content(flat, **metrics):
    values = {"num-examples": 10, "train-loss": 1.0, **metrics}
    return RecordDict(
        {"arrays": ArrayRecord({"adapter": Array(flat)}), "metrics": MetricRecord(values)}
    )


def honest(norm=1e-3):
    return np.full(100, norm / 10, np.float32)


def reply_checks(**settings):
    return ReplyChecks(replace(CONFIG.replies, **settings), CONFIG.train, MANIFEST)


def test_an_honest_reply_passes_with_its_numbers():
    accepted = reply_checks().check(content(honest()), BEFORE)
    assert accepted.metrics == {"num-examples": 10, "train-loss": 1.0}
    assert accepted.norm == pytest.approx(1e-3)


def test_a_reply_goes_on_to_flower_as_it_came():
    before = content(honest())
    message = reply_checks().check(before, BEFORE).message()
    assert message.content.metric_records["metrics"] == before.metric_records["metrics"]
    flat = message.content.array_records["arrays"]["adapter"].numpy()
    assert flat.tobytes() == honest().tobytes()


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (content(np.full(100, np.nan, np.float32)), "100 that are NaN"),
        (content(np.r_[honest()[:99], np.float32("inf")]), "1 that are NaN or infinite"),
        (content(honest()[:99]), "shape (99,)"),
        (content(honest().astype(np.float64)), "float64"),
        (content(honest() * 10**6), "as far as the recipe can reach"),
        (content(honest(), **{"num-examples": 10**9}), "found 1000000000"),
        (content(honest(), **{"num-examples": 0}), "found 0"),
        (content(honest(), **{"num-examples": 0.5}), "found 0.5"),
        (content(honest(), **{"train-loss": float("nan")}), "finite number as train-loss"),
        (content(honest(), **{"cards": [1.0, 2.0]}), "finite number as cards"),
        (RecordDict({"arrays": ArrayRecord({"adapter": Array(honest())})}), "found arrays"),
        (RecordDict(), "found nothing"),
    ],
)
def test_a_bad_reply_is_told_what_is_wrong_with_it(bad, found):
    with pytest.raises(BadReplyError) as caught:
        reply_checks().check(bad, BEFORE)
    assert found in str(caught.value)


def test_a_second_array_is_refused():
    two = content(honest())
    two.array_records["arrays"]["cards"] = Array(honest())
    with pytest.raises(BadReplyError, match="found adapter, cards"):
        reply_checks().check(two, BEFORE)


def test_an_update_far_larger_than_the_last_ones_is_refused():
    checking = reply_checks(max_norm_ratio=10.0)
    large = content(honest(1e-3 * 11))
    checking.check(large, BEFORE)  # as far as anyone knows, that is how updates are
    checking.norms.extend([1e-3] * 4)
    with pytest.raises(BadReplyError, match="10 times the median"):
        checking.check(large, BEFORE)
    checking.check(content(honest(1e-3 * 9)), BEFORE)


def test_the_recipes_reach_is_that_of_its_own_optimiser():
    beta1, beta2 = loop.ADAM_BETAS
    assert pytest.approx((1 - beta1) / (1 - beta2) ** 0.5) == _ADAM_STEP


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays.arrays(np.float32, arrays.array_shapes(max_dims=2, max_side=120)),
    st.integers(-(2**63), 2**63 - 1),
)
def test_whatever_arrives_is_accepted_finite_or_refused(flat, examples):
    try:
        accepted = reply_checks().check(content(flat, **{"num-examples": examples}), BEFORE)
    except BadReplyError:
        return
    assert accepted.flat.shape == (100,)
    assert np.isfinite(accepted.flat).all()
    assert 1 <= accepted.metrics["num-examples"] <= CONFIG.replies.max_num_examples
