"""Client sampling: who is asked follows from the order, who is online, and who has been asked."""

from __future__ import annotations

from flwr.common.constant import ErrorCode
from hypothesis import given
from hypothesis import strategies as st

from app.server import cohort
from app.server.ledger import Plan
from app.server.selection import MOST_ASKED, Selection

ORDER = ["c", "a", "d", "b"]


def selection(size=2, replacements=1, **plan):
    return Selection(Plan(1, **plan), lambda: ORDER, size, replacements)


def test_the_first_in_the_order_that_are_online_are_asked():
    assert selection().first(set(ORDER), 0) == ["c", "a"]
    assert selection().first({"b", "d"}, 0) == ["d", "b"]


def test_who_has_replied_leaves_fewer_to_ask():
    assert selection(asked={"c": ["m"]}).first(set(ORDER), 1) == ["a"]


def test_who_has_been_asked_is_no_candidate():
    assert selection(asked={"c": ["m"], "a": ["n"]}).replacement(set(ORDER)) == "d"


def test_there_are_only_so_many_replacements():
    chosen = selection(asked={"c": ["m"], "a": ["n"]})
    assert chosen.wants_replacement(1)
    chosen.replacement(set(ORDER))
    assert not chosen.wants_replacement(1)


def test_nobody_to_ask_instead_costs_no_replacement():
    chosen = selection(asked={name: ["m"] for name in ORDER})
    assert chosen.replacement(set(ORDER)) is None
    assert chosen.plan.replacements == 0


def test_an_institution_is_asked_again_only_so_often_and_only_online():
    chosen = selection(asked={"c": ["m"]})
    assert chosen.may_ask_again("c", {"c"})
    assert not chosen.may_ask_again("c", {"a"})
    chosen.plan.asked["c"] = ["m"] * MOST_ASKED
    assert not chosen.may_ask_again("c", {"c"})


def test_a_round_that_begins_again_forgets_failures_and_keeps_what_was_accepted():
    chosen = selection(asked={"c": ["m"], "a": ["n"]}, failed={"a": "no cards"}, replacements=1)
    chosen.begin_again({"c"})
    assert chosen.plan.asked == {"c": ["m"]}
    assert chosen.plan.failed == {}
    assert chosen.first(set(ORDER), 1) == ["a"]
    assert chosen.wants_replacement(1)


@given(st.sets(st.sampled_from(ORDER)), st.sets(st.sampled_from(ORDER)), st.integers(1, 4))
def test_nobody_is_asked_who_is_offline_or_was_asked_before(online, asked, size):
    chosen = selection(size=size, asked={name: ["m"] for name in asked})
    first = chosen.first(online, 0)
    assert set(first) <= online - asked
    assert first == sorted(first, key=ORDER.index)
    assert len(first) == min(size, len(online - asked))


def test_the_error_codes_are_flower_s():
    assert {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    } == cohort._PASSING
