"""Rounds: seed and name decide who trains, and no one who is lost holds them up."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array

from app.adapter.layout import Manifest, digest
from app.errors import AppError
from app.server.cohort import RunContext
from app.server.communication import Communication
from app.server.institutions import Institutions
from app.server.ledger import Ledger
from app.server.liveness import RESTARTED, RETURN_S
from app.server.polling import Mailbox
from app.server.reply_checks import ReplyChecks
from app.server.rounds import Rounds
from app.server.run_record import RunRecord
from app.server.strategies import SeededFedAvg
from tests.fake_grid import NAMES, FakeGrid, error, inside_a_run, reply
from tests.run_configs import default_config

MANIFEST = Manifest((("a", (2,)), ("b", (1,))))
CRASHED, UNAVAILABLE, RAISED = 8, 3, 2
CONFIG = default_config()


@pytest.fixture(autouse=True)
def run_without_roster(monkeypatch):
    inside_a_run(monkeypatch)


class Run:
    """A run on a fake grid, whose steps are so large that any small update is an honest one."""

    def __init__(self, grid, folder, *, sample_size=2, run_id=1, seed=42, **settings):
        self.grid, self.folder = grid, folder
        institutions = Institutions(grid)
        institutions.online()
        strategy = SeededFedAvg(
            institutions=institutions, seed=seed, sample_size=sample_size, fraction_evaluate=0.0
        )
        train = replace(CONFIG.train, learning_rate_max=1.0)
        self.context = RunContext(
            run_id,
            strategy,
            ReplyChecks(CONFIG.replies, train, MANIFEST),
            replace(CONFIG.rounds, **settings),
            MANIFEST,
            Ledger(folder / "ledger", MANIFEST),
            RunRecord(folder),
            Mailbox(grid, clock=grid.clock, sleep=grid.clock.sleep),
            clock=grid.clock,
            sleep=grid.clock.sleep,
        )
        self.rounds = Rounds(self.context, Communication(folder / "comm_cost.txt"))

    @property
    def strategy(self):
        return self.context.strategy

    def round(self, number=1):
        return self.rounds.run(number, np.zeros(3, np.float32))

    def events(self, *kinds):
        lines = (self.folder / "events.jsonl").read_text().splitlines()
        return [e for e in map(json.loads, lines) if not kinds or e["event"] in kinds]

    def who(self, kind):
        return [event["institution"] for event in self.events(kind)]


def asked_in(run, rounds):
    for number in range(1, rounds + 1):
        run.round(number)
    return [event["institutions"] for event in run.events("round-started")]


def seconds(run):
    before = run.grid.clock.now
    run.round()
    return run.grid.clock.now - before


# --- who is asked, and how replies become one ---


def test_the_same_seed_asks_the_same_institutions_whatever_their_node_ids(tmp_path):
    one = asked_in(Run(FakeGrid(shuffle_seed=1), tmp_path / "1"), 30)
    other = asked_in(Run(FakeGrid(shuffle_seed=2), tmp_path / "2"), 30)
    assert one == other


def test_another_seed_asks_others(tmp_path):
    one = asked_in(Run(FakeGrid(), tmp_path / "1"), 10)
    assert one != asked_in(Run(FakeGrid(), tmp_path / "2", seed=43), 10)


def test_every_institution_gets_its_turn(tmp_path):
    institutions = Institutions(FakeGrid())
    institutions.online()
    firsts = [institutions.order(42, number)[:2] for number in range(1, 101)]
    assert {name for pair in firsts for name in pair} == set(NAMES)


def test_a_simulation_without_names_asks_each_node_once_for_its_partition(tmp_path):
    grid = FakeGrid(named=False)
    asked = asked_in(Run(grid, tmp_path / "1"), 10)
    assert asked == asked_in(Run(FakeGrid(), tmp_path / "2"), 10)
    assert grid.queries == 20


def test_an_institution_that_is_offline_gives_its_place_to_the_next_in_order(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFED_INSTITUTIONS", ",".join(NAMES))
    everyone = Institutions(FakeGrid()).order(42, 1)
    grid = FakeGrid()
    grid.nodes[everyone[0]].online = False
    assert asked_in(Run(grid, tmp_path), 1) == [sorted(everyone[1:3])]


def test_the_average_does_not_depend_on_the_order_of_arrival(tmp_path):
    values = {name: np.random.default_rng(n).normal(size=3) for n, name in enumerate(NAMES)}
    results = set()
    for seed in range(5):
        grid = FakeGrid(train=lambda n, m: reply(m, values[n]), shuffle_seed=seed)
        results.add(Run(grid, tmp_path / str(seed), sample_size=20).round().flat.tobytes())
    assert len(results) == 1


def test_the_average_is_weighted_by_examples(tmp_path):
    weights = {"supernode-00": 1, "supernode-01": 3}
    grid = FakeGrid(
        list(weights),
        train=lambda n, m: reply(m, [weights[n]] * 3, examples=weights[n], loss=weights[n]),
    )
    run = Run(grid, tmp_path)
    result = run.round()
    assert result.flat.tolist() == [2.5, 2.5, 2.5]
    assert result.train_loss == 2.5
    assert run.who("reply") == sorted(weights)


def test_bytes_are_counted_in_both_directions_as_the_leaderboard_does(tmp_path):
    run = Run(FakeGrid(NAMES[:2]), tmp_path)
    run.round()
    one = len(Array(np.zeros(3, np.float32)).data)
    assert [e["bytes"] for e in run.events("round-finished")] == [4 * one]


def test_each_reply_and_each_round_carry_the_digest_of_their_adapter(tmp_path):
    values = {name: np.full(3, n, np.float32) for n, name in enumerate(NAMES[:2])}
    run = Run(FakeGrid(NAMES[:2], train=lambda n, m: reply(m, values[n])), tmp_path)
    result = run.round()
    replies = {e["institution"]: e for e in run.events("reply")}
    for name, adapter in values.items():
        assert replies[name]["adapter_sha256"] == digest(adapter)
        digests = digest(adapter[:2])[:8] + digest(adapter[2:])[:8]
        assert replies[name]["tensor_digests"] == digests
    (finished,) = run.events("round-finished")
    assert finished["adapter_sha256"] == digest(result.flat)


# --- those who are lost ---


def first_two(tmp_path):
    return Run(FakeGrid(), tmp_path / "order").strategy.order(1)[:3]


def test_an_institution_that_cannot_train_is_named_and_the_next_one_is_asked(tmp_path):
    broken, well, third = first_two(tmp_path)

    def train(name, message):
        if name == broken:
            return error(message, RAISED, "<class 'app.errors.AppError'>:<'no cards'>")
        return reply(message, [1, 1, 1])

    run = Run(FakeGrid(train=train), tmp_path)
    assert run.round().flat.tolist() == [1, 1, 1]
    assert [(e["institution"], e["reason"]) for e in run.events("reply-failed")] == [
        (broken, "no cards")
    ]
    assert run.who("asked") == [third]
    assert sorted(run.who("reply")) == sorted([well, third])


def test_an_error_in_the_superlinks_own_name_is_still_told_of_the_institution(tmp_path):
    broken = first_two(tmp_path)[0]

    def train(name, message):
        gone = error(message, 5, "node unavailable")
        gone.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's
        return gone if name == broken else reply(message, [1, 1, 1])

    run = Run(FakeGrid(train=train), tmp_path)
    run.round()
    assert run.who("reply-failed") == [broken]


@pytest.mark.parametrize("code", [CRASHED, UNAVAILABLE])
def test_a_clientapp_that_died_is_asked_again_so_that_the_same_institutions_train(tmp_path, code):
    crashes = first_two(tmp_path)[0]
    died = []

    def train(name, message):
        if name == crashes and not died:
            died.append(name)
            return error(message, code)
        return reply(message, [NAMES.index(name)] * 3)

    run = Run(FakeGrid(train=train), tmp_path)
    undisturbed = Run(
        FakeGrid(train=lambda n, m: reply(m, [NAMES.index(n)] * 3)), tmp_path / "undisturbed"
    )
    assert run.round().flat.tobytes() == undisturbed.round().flat.tobytes()
    assert run.who("asked") == [crashes]


def test_one_that_always_dies_is_replaced(tmp_path):
    crashes, _, third = first_two(tmp_path)
    grid = FakeGrid(train=lambda n, m: error(m, CRASHED) if n == crashes else reply(m, [1, 1, 1]))
    run = Run(grid, tmp_path)
    run.round()
    assert grid.asked.count(crashes) == 2
    assert third in run.who("reply")


def silent(grid, name):
    """Let a node fall silent as soon as it has its message."""

    def train(asked, message):
        if asked == name:
            grid.nodes[name].silent_since = grid.clock.now
            return None
        return reply(message, [1, 1, 1])

    grid.train = train
    return grid


def test_a_supernode_without_a_sign_of_life_costs_no_more_than_the_silence(tmp_path):
    dead, _, third = first_two(tmp_path)
    run = Run(silent(FakeGrid(), dead), tmp_path, heartbeat_timeout_s=10.0)
    assert seconds(run) <= 15.0
    assert run.who("institution-lost") == [dead]
    assert third in run.who("reply")


def test_a_slow_institution_is_waited_for(tmp_path):
    slow = first_two(tmp_path)[0]
    grid = FakeGrid(train=lambda n, m: (600.0 if n == slow else 0.0, reply(m, [1, 1, 1])))
    run = Run(grid, tmp_path)
    assert seconds(run) >= 600.0
    assert not run.events("institution-lost", "asked")


def test_a_supernode_that_goes_offline_is_replaced(tmp_path):
    gone, _, third = first_two(tmp_path)
    grid = FakeGrid(train=lambda n, m: None if n == gone else reply(m, [1, 1, 1]))
    grid.at(3.0, lambda: setattr(grid.nodes[gone], "online", False))
    run = Run(grid, tmp_path)
    assert seconds(run) <= 15.0
    assert third in run.who("reply")


def test_a_supernode_that_was_restarted_is_asked_again(tmp_path):
    restarted = first_two(tmp_path)[0]
    answers = []

    def train(name, message):
        if name == restarted and not answers:
            answers.append(None)
            return None
        return reply(message, [1, 1, 1])

    grid = FakeGrid(train=train)
    grid.at(4.0, lambda: setattr(grid.nodes[restarted], "activated", "2026-01-02T00:00:00"))
    run = Run(grid, tmp_path)
    assert seconds(run) <= 15.0
    assert run.who("asked") == [restarted]
    assert restarted in run.who("reply")


def test_a_machine_that_slept_holds_it_against_nobody(tmp_path):
    grid = FakeGrid(train=lambda n, m: (500.0, reply(m, [1, 1, 1])))
    grid.at(5.0, lambda: grid.clock.sleep(300.0))
    run = Run(grid, tmp_path)
    run.round()
    assert not run.events("institution-lost")


def test_nobody_is_silent_in_a_simulation_which_has_no_heartbeats(tmp_path):
    grid = FakeGrid(named=False, train=lambda n, m: (100.0, reply(m, [1, 1, 1])))
    for node in grid.nodes.values():
        node.silent_since = 0.0
    run = Run(grid, tmp_path)
    run.round()
    assert not run.events("institution-lost")


def test_a_round_asks_no_more_replacements_than_it_may(tmp_path):
    grid = FakeGrid(train=lambda n, m: error(m, RAISED))
    run = Run(grid, tmp_path, replacements=3, retries=0, max_wait_s=0.0)
    with pytest.raises(AppError):
        run.round()
    assert len(grid.asked) == 2 + 3


def test_a_deadline_ends_a_round_with_the_replies_that_are_there(tmp_path):
    slow = first_two(tmp_path)[0]
    grid = FakeGrid(train=lambda n, m: None if n == slow else reply(m, [1, 1, 1]))
    run = Run(grid, tmp_path, deadline_s=60.0, min_replies=1)
    assert 60.0 <= seconds(run) <= 65.0
    assert run.who("reply-missing") == [slow]


def test_a_late_reply_is_dropped_and_logged(tmp_path):
    slow = first_two(tmp_path)[0]
    grid = FakeGrid(
        train=lambda n, m: (90.0, reply(m, [7, 7, 7])) if n == slow else (40.0, reply(m, [1] * 3))
    )
    run = Run(grid, tmp_path, deadline_s=60.0, min_replies=1)
    for number in (1, 2):
        assert run.round(number).flat.tolist() == [1, 1, 1]
    assert run.who("reply-late") == [slow]


# --- rounds that fall short ---


def test_a_round_with_too_few_replies_is_tried_again(tmp_path):
    attempts = []

    def train(name, message):
        attempts.append(name)
        return error(message, RAISED) if len(attempts) <= 4 else reply(message, [1, 1, 1])

    run = Run(FakeGrid(train=train), tmp_path)
    run.round()
    assert len(run.events("round-retried")) == 1
    assert len(run.events("round-finished")) == 1


def test_what_was_accepted_is_kept_when_a_round_is_tried_again(tmp_path):
    well = first_two(tmp_path)[0]
    works = []

    def train(name, message):
        return reply(message, [1] * 3) if name == well or works else error(message, RAISED)

    grid = FakeGrid(train=train)
    grid.at(1.0, lambda: works.append(True))
    run = Run(grid, tmp_path, retries=0)
    run.round()
    assert grid.asked.count(well) == 1


def test_a_run_without_institutions_pauses_and_goes_on_when_they_are_back(tmp_path):
    grid = FakeGrid(NAMES[:2])
    for node in grid.nodes.values():
        node.online = False

    def back():
        for node in grid.nodes.values():
            node.online = True

    run = Run(grid, tmp_path)
    grid.at(1800.0, back)
    assert 1800.0 <= seconds(run) <= 2200.0
    (paused, *_) = run.events("paused")
    assert "2 more institutions" in paused["waits_for"]


def test_a_pause_that_is_too_long_ends_the_run_and_says_how_to_go_on(tmp_path):
    grid = FakeGrid(NAMES[:2], train=lambda n, m: error(m, RAISED, "no cards"))
    run = Run(grid, tmp_path, max_wait_s=600.0)
    with pytest.raises(AppError, match="no cards") as caught:
        run.round()
    assert "medfed run --resume" in caught.value.hint
    assert grid.clock.now - 1000.0 <= 900.0


def test_a_run_pauses_as_long_as_it_says_and_as_long_again_when_it_is_resumed(tmp_path):
    grid = FakeGrid(NAMES[:2], train=lambda n, m: error(m, RAISED, "no cards"))
    for run_id in (1, 2):
        begun = grid.clock.now
        with pytest.raises(AppError):
            Run(grid, tmp_path, run_id=run_id, max_wait_s=7200.0).round()
        assert 6900.0 <= grid.clock.now - begun <= 7200.0


# --- bad replies ---


@pytest.mark.parametrize(
    "bad",
    [
        lambda m: reply(m, [float("nan"), 0, 0]),
        lambda m: reply(m, [float("inf"), 0, 0]),
        lambda m: reply(m, [0, 0]),
        lambda m: reply(m, [1e6, 0, 0]),
        lambda m: reply(m, [0, 0, 0], examples=10**9),
        lambda m: reply(m, [0, 0, 0], loss=float("nan")),
    ],
    ids=["NaN", "Inf", "shape", "too large", "num-examples", "loss"],
)
def test_a_bad_reply_is_rejected_by_name_and_the_round_does_not_notice(tmp_path, bad):
    liar, _, third = first_two(tmp_path)
    grid = FakeGrid(train=lambda n, m: bad(m) if n == liar else reply(m, [1, 1, 1]))
    run = Run(grid, tmp_path)
    assert run.round().flat.tolist() == [1, 1, 1]
    assert run.who("reply-rejected") == [liar]
    assert third in run.who("reply")


def test_after_so_many_bad_replies_an_institution_is_quarantined(tmp_path):
    liar = "supernode-00"
    grid = FakeGrid(
        NAMES[:3], train=lambda n, m: reply(m, [float("nan")] * 3 if n == liar else [1] * 3)
    )
    run = Run(grid, tmp_path)
    for number in range(1, 21):
        run.round(number)
    assert run.who("reply-rejected") == [liar] * CONFIG.replies.quarantine_after
    assert run.who("quarantined") == [liar]


# --- another ServerApp goes on ---


class DiedError(Exception):
    """The ServerApp was killed."""


def killed_after(replies_seen, grid):
    """Let the coordinator die as it looks for replies after it has seen so many."""
    pull, seen = grid.pull_messages, []

    def pull_messages(ids):
        if len(seen) >= replies_seen:
            grid.pull_messages = pull
            raise DiedError
        there = pull(ids)[: replies_seen - len(seen)]
        seen.extend(there)
        return there

    grid.pull_messages = pull_messages
    return grid


@pytest.mark.parametrize("replies_seen", [0, 1])
@pytest.mark.parametrize("run_id", [1, 2], ids=["same run", "another run"])
def test_a_round_in_flight_goes_on_bit_for_bit(tmp_path, replies_seen, run_id):
    def train(name, message):
        # One at a time, so that the coordinator can die between the two.
        return 5.0 * len(grid.asked), reply(message, [NAMES.index(name) / 3] * 3)

    grid = FakeGrid(train=train)
    expected = Run(grid, tmp_path / "undisturbed").round().flat.tobytes()
    grid = killed_after(replies_seen, FakeGrid(train=train))
    with pytest.raises(DiedError):
        Run(grid, tmp_path).round()
    asked_before = list(grid.asked)
    run = Run(grid, tmp_path, run_id=run_id)
    assert run.round().flat.tobytes() == expected
    asked_again = grid.asked[len(asked_before) :]
    # Only messages of another run are lost, and with them only what had not been accepted yet.
    assert len(asked_again) == (2 - replies_seen if run_id == 2 else 0)
    assert not run.events("institution-lost")


def died_in_a_round(folder):
    """A grid on which everything has died with a round in flight, and who was asked in it."""
    grid = killed_after(0, FakeGrid(train=lambda name, message: None))
    with pytest.raises(DiedError):
        Run(grid, folder).round()
    asked = list(grid.asked)
    grid.train = lambda name, message: reply(message, [1, 1, 1])
    return grid, asked


@pytest.mark.parametrize("remembered_s", [0, 20], ids=["offline", "taken for online at first"])
def test_who_comes_back_with_the_coordinator_is_waited_for(tmp_path, remembered_s):
    grid, asked = died_in_a_round(tmp_path)
    node = grid.nodes[asked[0]]

    def back():
        node.online, node.silent_since = True, None
        node.activated = "2026-01-02T00:00:00"

    node.silent_since = grid.clock.now
    grid.at(remembered_s, lambda: setattr(node, "online", False))
    grid.nodes[asked[1]].activated = "2026-01-02T00:00:00"
    grid.at(40.0, back)
    run = Run(grid, tmp_path)
    run.round()
    assert sorted(run.who("reply")) == sorted(asked)
    assert {e["reason"] for e in run.events("institution-lost")} == {RESTARTED}


@pytest.mark.parametrize("online", [False, True], ids=["offline", "taken for online for ever"])
def test_who_does_not_come_back_is_replaced_after_a_while(tmp_path, online):
    grid, asked = died_in_a_round(tmp_path)
    grid.nodes[asked[0]].online = online
    grid.nodes[asked[0]].silent_since = grid.clock.now
    grid.nodes[asked[1]].activated = "2026-01-02T00:00:00"
    run = Run(grid, tmp_path)
    assert RETURN_S <= seconds(run) <= RETURN_S + 15
    assert asked[0] not in run.who("reply")
    assert len(run.who("reply")) == 2


def test_who_gave_a_sign_to_this_coordinator_is_not_waited_for_longer(tmp_path):
    grid, asked = died_in_a_round(tmp_path)
    grid.nodes[asked[1]].activated = "2026-01-02T00:00:00"
    grid.at(8.0, lambda: setattr(grid.nodes[asked[0]], "silent_since", grid.clock.now))
    run = Run(grid, tmp_path, heartbeat_timeout_s=10.0)
    assert seconds(run) <= 8.0 + 15.0
    assert asked[0] not in run.who("reply")


def test_a_superlink_that_lost_a_message_with_its_reply_has_it_answered_anew(tmp_path):
    grid = killed_after(0, FakeGrid())
    with pytest.raises(DiedError):
        Run(grid, tmp_path).round()
    lost = grid.asked[0]
    grid._mail = [
        (when, error(SimpleMessage(mail), UNAVAILABLE) if mail_of(mail, lost) else mail)
        for when, mail in grid._mail
    ]
    run = Run(grid, tmp_path)
    run.round()
    assert run.who("asked") == [lost]
    assert lost in run.who("reply")


def mail_of(mail, name):
    return mail.metadata.reply_to_message_id.endswith(name)


class SimpleMessage:
    """Stands for the message that ``mail`` replies to."""

    def __new__(cls, mail):
        from flwr.app import Message, RecordDict

        message = Message(RecordDict(), dst_node_id=1, message_type="train")
        message.metadata.__dict__["_message_id"] = mail.metadata.reply_to_message_id
        return message


# --- the beginning ---


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
    online = Institutions(FakeGrid()).wait_for(lambda n: n, 0.0, lambda *_: None)
    assert list(online) == NAMES
