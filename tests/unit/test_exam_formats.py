"""Cards as exam questions: the same every time, the hospital's own, and fair."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from app.cards.exam_formats import (
    ENTRANCE_EXAM,
    LETTERS,
    LICENSING_EXAM,
    STATEMENT,
    with_answer_formats,
)
from app.errors import AppError

CARDS = Path(__file__).parents[3] / "shared/data/train/medical_flashcards_subset.jsonl"
COLUMNS = ["instruction", "input", "output"]
EXAMS = (ENTRANCE_EXAM, LICENSING_EXAM)


def deck(n, start=0):
    organs = ["liver", "kidney", "lung", "heart", "spleen", "skin", "retina", "colon"]
    return [
        {
            "instruction": "Answer this question truthfully",
            "input": f"What is disease{i} known for?",
            "output": f"Disease{i} is a disorder of the {organs[i % 8]} in stage{i}. It is rare.",
        }
        for i in range(start, start + n)
    ]


def as_dataset(rows):
    return Dataset.from_dict({column: [row[column] for row in rows] for column in COLUMNS})


def changed(before, after):
    return [new for old, new in zip(before, after, strict=True) if old != new]


def options_of(row):
    lines = row["input"].split("Options:\n")[1].split("\nThe answer is:")[0].split("\n")
    return {line[0]: line[3:] for line in lines}


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 40), seed=st.integers(0, 2**62), share=st.floats(0, 1))
def test_the_same_seed_gives_the_same_rows_in_the_same_schema(n, seed, share):
    cards = as_dataset(deck(n))
    once = with_answer_formats(cards, seed=seed, share=share)
    assert once.to_list() == with_answer_formats(cards, seed=seed, share=share).to_list()
    assert (len(once), once.column_names) == (n, COLUMNS)
    assert len(changed(cards, once)) <= round(share * n)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**62))
def test_every_answer_is_right_by_the_cards(seed):
    rows = deck(40)
    cards = as_dataset(rows)
    for old, new in zip(rows, with_answer_formats(cards, seed=seed, share=1.0), strict=True):
        prompt = new["input"]
        assert prompt == f"{new['instruction']}\n" + prompt.split("\n", 1)[1]
        assert prompt.endswith("\nThe answer is:\n")
        if new["instruction"] in EXAMS:
            options = options_of(new)
            assert f"Question: {old['input']}\n" in prompt
            assert list(options) == list(LETTERS)
            assert len(set(options.values())) == 4
            assert options[new["output"]] in old["output"]
            assert sum(option in old["output"] for option in options.values()) == 1
        else:
            assert new["instruction"] == STATEMENT
            *context, claim = prompt.split("\n")[1:-2]
            stated = (
                claim.removeprefix("Is ").removesuffix("?").replace(" a disorder", " is a disorder")
            )
            own = old["output"] in context
            says_so = any(stated in text for text in context)
            assert new["output"] == ("maybe" if not own else "yes" if says_so else "no")


def test_another_partition_gives_other_questions():
    cards = as_dataset(deck(40))
    first, second = (with_answer_formats(cards, seed=seed, share=1.0) for seed in (1, 2))
    assert first.to_list() != second.to_list()


def test_a_larger_share_keeps_the_questions_of_a_smaller_one_as_they_were():
    cards = as_dataset(deck(40))
    some, every = (with_answer_formats(cards, seed=5, share=share) for share in (0.5, 1.0))
    assert all(row in every.to_list() for row in changed(cards, some))


def test_no_text_of_another_hospital_is_in_a_question():
    ours = as_dataset(deck(40))
    text = " ".join(with_answer_formats(ours, seed=3, share=1.0)["input"])
    assert not any(f"isease{i} " in text for i in range(40, 80))


def test_no_letter_is_worth_guessing():
    letters = Counter(with_answer_formats(as_dataset(deck(2000)), seed=4, share=1.0)["output"])
    drawn = [letters[letter] for letter in LETTERS]
    assert min(drawn) > 0.85 * sum(drawn) / 4


def test_options_are_as_short_as_an_exams_and_end_with_a_word_that_says_something():
    rows = deck(40)
    for number, row in enumerate(rows):
        row["output"] = f"Loss of stage{number} cells in a part of the body, by the way."
    questions = with_answer_formats(as_dataset(rows), seed=6, share=1.0)
    options = [text for row in questions for text in options_of(row).values()]
    assert {text.split("stage")[0] for text in options} == {"Loss of "}
    assert {text.split(" ", 3)[-1] for text in options} == {"cells"}


def test_a_claim_is_right_as_often_as_in_published_papers():
    asked = with_answer_formats(as_dataset(deck(2000)), seed=4, share=1.0)
    verdicts = Counter(row["output"] for row in asked if row["instruction"] == STATEMENT)
    assert verdicts["yes"] == pytest.approx(0.84 * verdicts.total(), rel=0.1)
    assert verdicts["no"] > verdicts["maybe"] > 0


def test_share_nothing_changes_nothing():
    rows = deck(10)
    assert with_answer_formats(as_dataset(rows), seed=1, share=0.0).to_list() == rows


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_hospital_with_too_few_cards_keeps_them_as_cards(n):
    rows = deck(n)
    after = with_answer_formats(as_dataset(rows), seed=1, share=1.0)
    assert all(row["output"] not in LETTERS for row in after)


def test_a_share_that_is_none_is_refused():
    with pytest.raises(AppError, match="from 0 to 1"):
        with_answer_formats(as_dataset(deck(4)), seed=1, share=1.5)


@pytest.mark.skipif(not CARDS.is_file(), reason="the flashcards are not here")
def test_nearly_all_real_cards_lend_themselves_to_a_question():
    rows = [json.loads(line) for line in CARDS.read_text().splitlines()[:400]]
    kinds = Counter(
        row["instruction"] for row in with_answer_formats(as_dataset(rows), seed=1, share=1.0)
    )
    assert sum(kinds[kind] for kind in (*EXAMS, STATEMENT)) >= 0.98 * len(rows)
    assert kinds[STATEMENT] >= 0.15 * len(rows)
