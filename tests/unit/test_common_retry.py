"""common/retry.py: waits that double up to a longest, jitter that only shortens them, an end."""

from __future__ import annotations

from itertools import islice, pairwise

from hypothesis import given
from hypothesis import strategies as st

from common.retry import RetryPolicy
from tests.fake_clock import Clock

POLICIES = st.builds(
    RetryPolicy,
    first_s=st.floats(0.01, 100),
    longest_s=st.floats(0.01, 1000),
    jitter=st.floats(0, 1),
)


@given(POLICIES, st.integers(1, 40))
def test_waits_double_from_the_first_to_the_longest(policy, count):
    waits = list(islice(policy.waits(draw=lambda _low, high: high), count))
    assert waits[0] == min(policy.first_s, policy.longest_s)
    assert all(after == min(2 * before, policy.longest_s) for before, after in pairwise(waits))


@given(POLICIES, st.integers(1, 40))
def test_no_wait_is_above_the_longest_and_jitter_only_shortens_within_its_share(policy, count):
    whole = islice(policy.waits(draw=lambda _low, high: high), count)
    for wait, most in zip(policy.waits(), whole, strict=False):
        assert (1 - policy.jitter) * most <= wait <= most <= policy.longest_s


def test_without_jitter_nothing_is_drawn():
    def draw(low: float, high: float) -> float:
        raise AssertionError(f"drew between {low} and {high}")

    assert list(islice(RetryPolicy(1, 30).waits(draw=draw), 7)) == [1, 2, 4, 8, 16, 30, 30]


def test_two_nodes_with_jitter_do_not_retry_in_step():
    policy = RetryPolicy(1, 60, jitter=0.5)
    assert list(islice(policy.waits(), 10)) != list(islice(policy.waits(), 10))


@given(POLICIES, st.floats(0, 10_000))
def test_it_gives_up_once_its_time_is_over_and_at_most_one_wait_later(policy, give_up):
    clock = Clock()
    limited = RetryPolicy(policy.first_s, policy.longest_s, 0.0, give_up)
    for wait in islice(limited.waits(clock), 100):
        assert clock.now < give_up
        clock.sleep(wait)
    assert clock.now <= give_up + policy.longest_s


def test_the_first_attempt_counts_against_the_time_until_giving_up():
    clock = Clock()
    waits = RetryPolicy(1, 8, give_up_s=10).waits(clock)
    clock.sleep(10)  # the attempt itself took as long
    assert list(waits) == []


def test_a_policy_that_never_gives_up_does_not():
    clock = Clock()
    for wait in islice(RetryPolicy(1, 60).waits(clock), 2000):
        clock.sleep(wait)
    assert clock.now > 24 * 3600
