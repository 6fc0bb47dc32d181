"""The round ledger: a crash at any line, or a bad disk, leaves a state that resumes."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest

from app import durable
from app.adapter.layout import Manifest
from app.errors import AppError
from app.server.ledger import KEPT_ROUNDS, Ledger, Plan, Saved
from app.server.reply_checks import Accepted

MANIFEST = Manifest((("a", (2,)), ("b", (1,))))


def state(number):
    return Saved(
        round=number,
        flat=np.full(3, number / 3, np.float32),
        strategy={"momentum_vector.0": np.full(3, number, np.float32)},
        bytes=100 * number,
        lines=2 * number,
        norms=(0.1, 0.2),
        bad_replies={"supernode-03": 2},
        holdout_before=3.5,
        holdout_after=3.25,
        train_loss=1.5,
    )


def same(one, other):
    ones, others = vars(one).copy(), vars(other).copy()
    assert ones.pop("flat").tobytes() == others.pop("flat").tobytes()
    memory, others_memory = ones.pop("strategy"), others.pop("strategy")
    assert {k: v.tobytes() for k, v in memory.items()} == {
        k: v.tobytes() for k, v in others_memory.items()
    }
    assert ones == others
    return True


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger", MANIFEST)


def test_a_new_run_has_no_last_round(ledger):
    assert ledger.last() is None


def test_what_was_committed_is_read_back_bit_for_bit(ledger):
    ledger.commit(state(1))
    assert same(ledger.last(), state(1))


def test_only_the_last_rounds_are_kept(ledger):
    for number in range(1, 8):
        ledger.commit(state(number))
    assert ledger.last().round == 7
    assert len(list(ledger.folder.glob("round_*.json"))) == KEPT_ROUNDS
    assert len(list(ledger.folder.glob("round_*.safetensors"))) == KEPT_ROUNDS


class CrashError(Exception):
    """The machine lost power."""


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_crash_at_any_write_leaves_a_round_that_is_whole(ledger, monkeypatch, call):
    """Let the power fail at each write, sync or rename of a commit in turn."""
    ledger.commit(state(1))
    crashes = 0
    while True:
        countdown = [crashes]

        def crash(real, countdown=countdown):
            def wrapped(*arguments, **options):
                if not countdown[0]:
                    raise CrashError
                countdown[0] -= 1
                return real(*arguments, **options)

            return wrapped

        with monkeypatch.context() as power:
            if call == "write":
                power.setattr(durable, "write", crash(durable.write))
            elif call == "fsync":
                power.setattr(os, "fsync", crash(os.fsync))
            else:
                power.setattr(durable.Path, "replace", crash(durable.Path.replace))
            try:
                ledger.commit(state(2))
                break
            except CrashError:
                crashes += 1
        last = ledger.last()
        assert same(last, state(last.round))
        assert last.round in (1, 2)
    assert crashes >= 2
    assert same(ledger.last(), state(2))


@pytest.mark.parametrize("damage", [b"", b"\0" * 200, None])
@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_damaged_round_gives_way_to_the_one_before(ledger, kind, damage):
    ledger.commit(state(1))
    ledger.commit(state(2))
    file = ledger.folder / f"round_2.{kind}"
    file.write_bytes(file.read_bytes()[:-10] if damage is None else damage)
    assert same(ledger.last(), state(1))


def test_a_ledger_with_nothing_but_damage_is_an_error_and_stays_as_it_is(ledger):
    ledger.commit(state(1))
    (ledger.folder / "round_1.safetensors").write_bytes(b"")
    with pytest.raises(AppError, match="found 1 that are damaged"):
        ledger.last()
    assert (ledger.folder / "round_1.json").is_file()


def test_another_models_ledger_is_refused(ledger):
    ledger.commit(state(1))
    other = Ledger(ledger.folder, Manifest((("c", (3,)),)))
    with pytest.raises(AppError, match="found another's"):
        other.last()


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "a full disk"), (errno.EROFS, "cannot be written"), (errno.EIO, "Input")],
)
def test_a_disk_that_fails_is_named_and_the_last_round_is_still_there(
    ledger, monkeypatch, code, words
):
    ledger.commit(state(1))

    def fails(descriptor):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", fails)
        with pytest.raises(AppError, match=words) as caught:
            ledger.commit(state(2))
    assert "medfed run --resume" in caught.value.hint
    assert same(ledger.last(), state(1))
    assert not list(ledger.folder.glob(".*"))


# --- the round in flight ---


def accepted(value):
    return Accepted(np.full(3, value, np.float32), {"num-examples": 7, "train-loss": 0.1}, 0.3)


def test_accepted_replies_are_read_back_bit_for_bit(ledger):
    in_flight = ledger.in_flight(1)
    in_flight.note(Plan(5, asked={"supernode-01": ["m"], "supernode-02": ["n"]}))
    in_flight.accept("supernode-01", accepted(1 / 3))
    again = ledger.in_flight(1)
    assert again.plan().asked == {"supernode-01": ["m"], "supernode-02": ["n"]}
    found = again.accepted(again.plan().asked)
    assert list(found) == ["supernode-01"]
    assert found["supernode-01"].flat.tobytes() == accepted(1 / 3).flat.tobytes()
    assert found["supernode-01"].metrics == {"num-examples": 7, "train-loss": 0.1}
    assert isinstance(found["supernode-01"].metrics["num-examples"], int)


def test_a_damaged_reply_is_asked_for_again(ledger):
    in_flight = ledger.in_flight(1)
    in_flight.note(Plan(5, asked={"supernode-01": ["m"]}))
    in_flight.accept("supernode-01", accepted(1))
    file = ledger.folder / "flight_1" / "supernode-01.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert in_flight.accepted(["supernode-01"]) == {}


def test_a_damaged_plan_begins_the_round_anew(ledger):
    in_flight = ledger.in_flight(1)
    in_flight.note(Plan(5))
    (ledger.folder / "flight_1" / "plan.json").write_text("{")
    assert in_flight.plan() is None


def test_a_finished_round_forgets_its_flight_and_the_deaths_before_it(ledger):
    assert [ledger.started(5), ledger.started(5), ledger.started(5)] == [1, 2, 3]
    ledger.in_flight(1).note(Plan(5))
    ledger.commit(state(1))
    assert ledger.in_flight(1).plan() is None
    assert ledger.started(5) == 2  # the one that finished the round, and this one


def test_starts_are_counted_for_each_run_by_itself(ledger):
    assert [ledger.started(5), ledger.started(5), ledger.started(6)] == [1, 2, 1]


def test_a_plan_is_json_for_people(ledger):
    ledger.in_flight(3).note(Plan(5, asked={"supernode-01": ["m"]}, failed={"x": "no cards"}))
    plan = json.loads((ledger.folder / "flight_3" / "plan.json").read_text())
    assert plan["failed"] == {"x": "no cards"}
