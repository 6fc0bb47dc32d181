from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from app.cards.check import check, token_counter
from app.cards.tokens import card_text
from app.errors import AppError
from medfed.commands.data import app
from tests.tiny_tokenizer import tiny_tokenizer

CARDS = [{"instruction": "i", "input": f"q{n}", "output": "word " * n} for n in range(1, 21)]


def write(file: Path, rows: list[object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_good_cards_are_counted_and_accepted(tmp_path: Path):
    write(tmp_path / "a.jsonl", CARDS[:15])
    Dataset.from_list(CARDS[15:]).to_csv(tmp_path / "b.csv", index=False)
    report = check(tmp_path)
    assert (report.rows, report.duplicates, report.empty_answers) == (20, 0, 0)
    assert report.bad_rows == ()
    assert report.tokens is None
    assert [file.name for file in report.files] == ["a.jsonl", "b.csv"]


def test_token_lengths_are_those_of_the_training_text(tmp_path: Path):
    counted: list[str] = []

    def words(texts: list[str]) -> list[int]:
        counted.extend(texts)
        return [len(text.split()) for text in texts]

    tokens = check(write(tmp_path / "a.jsonl", CARDS), words, seq_length=35).tokens
    assert counted[0] == card_text("q1", "word ", "i")
    prompt = len(card_text("q1", "").split())
    assert tokens is not None
    assert (tokens.max, tokens.p95, tokens.mean) == (prompt + 20, prompt + 19, prompt + 10.5)
    assert tokens.over_seq_length == (prompt + 20 - 35) / 20


def test_a_repeated_card_is_a_duplicate_but_can_be_used(tmp_path: Path):
    report = check(write(tmp_path / "a.jsonl", [*CARDS, CARDS[3], CARDS[3]]))
    assert report.duplicates == 2
    assert report.bad_rows == ()


def test_every_bad_row_is_listed_with_its_line(tmp_path: Path):
    bad = [{"input": "q", "output": "a"}, [], {**CARDS[0], "output": " "}, {**CARDS[0], "input": 7}]
    report = check(write(tmp_path / "a.jsonl", [CARDS[0], *bad, CARDS[1]]))
    assert [row.line for row in report.bad_rows] == [2, 3, 4, 5]
    assert report.empty_answers == 1
    assert report.rows == 6


def test_nothing_to_check_is_refused(tmp_path: Path):
    with pytest.raises(AppError, match="found no such file"):
        check(tmp_path)
    with pytest.raises(AppError, match="at least one card"):
        check(write(tmp_path / "a.jsonl", []))
    with pytest.raises(AppError, match=r"ending in \.jsonl"):
        check(write(tmp_path / "a.txt", []))


def test_tokens_are_counted_with_a_models_own_tokenizer(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert token_counter(str(tmp_path))(["a fever", ""]) == [
        len(tiny_tokenizer()("a fever").input_ids),
        0,
    ]


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(AppError, match="found no such folder"):
        token_counter(str(tmp_path / "nope"))
    with pytest.raises(AppError, match="expected the tokenizer of"):
        token_counter(str(tmp_path))


def test_the_command_accepts_good_cards(tmp_path: Path):
    result = CliRunner().invoke(app, ["check", str(write(tmp_path / "a.jsonl", CARDS))])
    assert result.exit_code == 0
    assert "20" in result.stdout


def test_the_command_refuses_bad_cards_with_file_and_line(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", [CARDS[0], {**CARDS[1], "output": ""}])
    result = CliRunner().invoke(app, ["check", str(file)])
    assert result.exit_code == 1
    assert f"{file}:2: " in result.stderr


def test_the_command_reports_as_json(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", [CARDS[0], {**CARDS[1], "output": ""}])
    result = CliRunner().invoke(app, ["check", str(file), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert report["rows"] == 2
    assert report["bad_rows"][0]["line"] == 2
