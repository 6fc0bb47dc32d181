from __future__ import annotations

import csv
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from app.cards.dataset import resolve
from app.cards.files import COLUMNS
from app.cards.partitions import cards_of_node
from app.cards.tokens import RESPONSE_TEMPLATE, card_text, tokenize_texts
from app.errors import AppError
from tests.tiny_tokenizer import tiny_tokenizer

# Any text that UTF-8 can hold: no lone surrogates.
text = st.text(st.characters(codec="utf-8"), max_size=30)
cards = st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, text)), min_size=1, max_size=8)
not_text = st.none() | st.booleans() | st.integers() | st.floats() | st.lists(text, max_size=2)


def write(rows: list[dict[str, str]], file: Path) -> None:
    if file.suffix == ".jsonl":
        file.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    elif file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(file)


def load(folder: str) -> list[dict[str, str]]:
    return [dict(row) for row in cards_of_node({"data-path": folder}, "unused")]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@settings(max_examples=60, deadline=None)
@given(rows=cards)
def test_well_formed_cards_load_back_unchanged(suffix: str, rows: list[dict[str, str]]):
    with TemporaryDirectory() as folder:
        write(rows, Path(folder, f"train.{suffix}"))
        assert load(folder) == rows


@settings(max_examples=60, deadline=None)
@given(
    rows=cards,
    place=st.integers(0, 8),
    bad=st.one_of(
        # JSON's own objects with one column missing or not text, other values, and cut-off lines.
        st.sampled_from(COLUMNS).map(lambda gone: {c: "x" for c in COLUMNS if c != gone}),
        st.tuples(st.sampled_from(COLUMNS), not_text).map(
            lambda wrong: {**dict.fromkeys(COLUMNS, "x"), wrong[0]: wrong[1]}
        ),
        not_text,
    ).map(json.dumps)
    | st.just('{"instruction": "x", "input":'),
)
def test_a_malformed_row_is_reported_with_its_file_and_line(
    rows: list[dict[str, str]], place: int, bad: str
):
    place = min(place, len(rows))
    lines = [json.dumps(row) for row in rows]
    lines.insert(place, bad)
    with TemporaryDirectory() as folder:
        file = Path(folder, "train.jsonl")
        file.write_text("\n".join(lines) + "\n")
        with pytest.raises(AppError) as refused:
            load(folder)
        assert refused.value.args[0].startswith(f"{file}:{place + 1}: ")


@settings(max_examples=60, deadline=None)
@given(rows=cards, place=st.integers(0, 8), fields=st.sampled_from([1, 2, 4]))
def test_a_csv_row_with_too_few_or_many_fields_is_reported_with_its_line(
    rows: list[dict[str, str]], place: int, fields: int
):
    place = min(place, len(rows))
    with TemporaryDirectory() as folder:
        file = Path(folder, "train.csv")
        write(rows[:place], file)
        line = 1 + sum(1 for _ in file.open(encoding="utf-8", newline=None))
        with file.open("a", newline="") as stream:
            csv.writer(stream).writerow(["x"] * fields)
        with pytest.raises(AppError) as refused:
            load(folder)
        assert refused.value.args[0].startswith(f"{file}:{line}: expected 3 fields")


@settings(max_examples=15, deadline=None)
@given(count=st.integers(30, 70), parts=st.integers(1, 20))
def test_partitions_and_what_is_held_out_are_disjoint_and_cover_the_dataset(count: int, parts: int):
    rows = [{"instruction": "", "input": str(n), "output": "x"} for n in range(count)]
    with TemporaryDirectory() as folder:
        write(rows, Path(folder, "train.jsonl"))
        cut = [resolve(folder).partition(parts, n) for n in range(parts)]
        held_out = resolve(folder).holdout(count)
    assert held_out is not None
    seen = [row["input"] for part in (*cut, held_out) for row in part]
    assert sorted(seen, key=int) == [row["input"] for row in rows]
    assert max(map(len, cut)) - min(map(len, cut)) <= 1


def completion_only_labels(ids: list[int], template: list[int]) -> list[int]:
    """What TRL's DataCollatorForCompletionOnlyLM leaves of the labels (-100: not learnt)."""
    labels = list(ids)
    begins = None
    for at in range(len(ids)):
        if ids[at] == template[0] and ids[at : at + len(template)] == template:
            begins = at
    end = len(ids) if begins is None else begins + len(template)
    return [-100] * end + labels[end:]


@settings(max_examples=150, deadline=None)
@given(
    question=text,
    answer=st.lists(text | st.sampled_from([RESPONSE_TEMPLATE, " Response:", "###"])).map("".join),
    seq_length=st.integers(8, 160),
)
def test_the_labels_are_those_of_the_references_collator(
    question: str, answer: str, seq_length: int
):
    tokenizer = tiny_tokenizer()
    (example,) = tokenize_texts([card_text(question, answer)], tokenizer, seq_length)
    template = tokenizer.encode("\n### Response:", add_special_tokens=False)[2:]
    ids = tokenizer(card_text(question, answer)).input_ids[:seq_length]
    labels = completion_only_labels(ids, template)
    assert list(example.input_ids) == ids
    assert [-100] * example.prompt_length + list(ids[example.prompt_length :]) == labels


@settings(max_examples=100, deadline=None)
@given(question=text, answer=text)
def test_the_labels_decode_to_exactly_the_answer(question: str, answer: str):
    assume("Response:" not in answer)
    tokenizer = tiny_tokenizer()
    (example,) = tokenize_texts([card_text(question, answer)], tokenizer, 4096)
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == f" {answer}"
