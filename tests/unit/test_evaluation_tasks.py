"""The four benchmarks: prompts in the leaderboard's words, from rows in their sources' schemas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app.cards import exam_formats
from common.errors import EvaluationError
from evaluation.catalogue import TASKS, task, tasks
from evaluation.medmcqa import ENTRANCE_EXAM
from evaluation.sources import rows_of
from evaluation.task import wrap

EVAL = Path(__file__).parents[3] / "shared/data/eval"

PUBMEDQA = {"QUESTION": "Is it so?", "CONTEXTS": ["One.", "Two."], "final_decision": "maybe"}
MEDMCQA = {"question": "Which", "opa": "w", "opb": "x", "opc": "y", "opd": "z"}
MEDQA = {"question": "Who?", "answer": "x", "options": {"A": "w", "B": "x", "C": "y", "D": "z"}}
CAREQA = {"question": "Who?", "op1": "w", "op2": "x", "op3": "y", "op4": "z", "cop": 4}


def ask(name, *rows, from_hub=False):
    return task(name).questions(rows, from_hub=from_hub)


def test_pubmedqa_asks_about_its_abstract():
    (question,) = ask("pubmedqa", PUBMEDQA)
    assert question.gold == "maybe"
    assert question.prompt == (
        "As an expert doctor in clinical science and medical knowledge, can you tell me if the "
        "following statement is correct? Answer yes, no, or maybe.\n"
        "One.\nTwo.\nIs it so?\nThe answer is:\n"
    )


def test_a_choice_is_lettered_and_an_open_question_gets_its_mark():
    first, _ = ask("medmcqa", {**MEDMCQA, "cop": 1}, {**MEDMCQA, "cop": 4})
    assert first.prompt == (
        f"{ENTRANCE_EXAM}\nQuestion: Which?\n\nOptions:\nA. w\nB. x\nC. y\nD. z\nThe answer is:\n"
    )


def test_medmcqa_counts_from_one_in_its_authors_files_and_from_zero_on_the_hub():
    authors = ask("medmcqa", *({**MEDMCQA, "cop": cop} for cop in (1, 4)))
    hub = ask("medmcqa", *({**MEDMCQA, "cop": cop} for cop in (0, 3)))
    assert [q.gold for q in authors] == [q.gold for q in hub] == ["A", "D"]
    (alone,) = ask("medmcqa", {**MEDMCQA, "cop": 1}, from_hub=True)
    assert alone.gold == "B"


@pytest.mark.parametrize("cops", [(1, 2), (0, 4)])
def test_a_medmcqa_file_that_may_count_either_way_is_refused(cops):
    with pytest.raises(EvaluationError, match="count from 0"):
        ask("medmcqa", *({**MEDMCQA, "cop": cop} for cop in cops))


def test_medqa_reads_the_authors_object_and_the_hubs_list_of_options():
    pairs = [{"key": key, "value": value} for key, value in MEDQA["options"].items()]
    assert ask("medqa", MEDQA) == ask("medqa", {**MEDQA, "options": pairs})
    assert ask("medqa", MEDQA)[0].gold == "B"


def test_careqa_asks_in_medmcqas_words_and_counts_from_one():
    (question,) = ask("careqa", CAREQA)
    assert question.gold == "D"
    assert question.prompt.startswith(ENTRANCE_EXAM)


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("pubmedqa", {"QUESTION": "q"}, "no CONTEXTS in row 1"),
        ("pubmedqa", {**PUBMEDQA, "CONTEXTS": "one text"}, "something else in row 1"),
        ("pubmedqa", {**PUBMEDQA, "final_decision": "perhaps"}, "found 'perhaps'"),
        ("medqa", {**MEDQA, "answer": "none"}, "row 1"),
        ("medqa", {**MEDQA, "options": "w, x"}, "something else in row 1"),
        ("careqa", {**CAREQA, "cop": 5}, "found 'cop 5'"),
        ("careqa", {**CAREQA, "cop": "first"}, "something else in row 1"),
    ],
)
def test_a_row_in_another_schema_is_named(name, row, complaint):
    with pytest.raises(EvaluationError, match=complaint) as caught:
        ask(name, row)
    assert "\n" not in str(caught.value)


def test_a_folder_gives_the_one_file_of_a_benchmark(tmp_path):
    (tmp_path / "careqa_test.jsonl").write_text(json.dumps(CAREQA) + "\n")
    assert rows_of(task("careqa"), tmp_path) == [CAREQA]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "found none"),
        ({"careqa_a.jsonl": "{}", "careqa_b.jsonl": "{}"}, "found careqa_a.jsonl, careqa_b.jsonl"),
        ({"careqa.jsonl": ""}, "empty file"),
        ({"careqa.jsonl": "{}\n{oops"}, "line 2"),
        ({"careqa.jsonl": "[1]"}, "found a list"),
    ],
)
def test_data_that_cannot_be_read_is_refused_in_one_line(files, complaint, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=complaint) as caught:
        rows_of(task("careqa"), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="found none at"):
        rows_of(task("careqa"), tmp_path / "none")


def test_benchmarks_are_listed_once_each_in_the_order_given():
    assert [t.name for t in tasks("medqa, pubmedqa,medqa")] == ["medqa", "pubmedqa"]
    with pytest.raises(EvaluationError, match="found none"):
        tasks(" ,")


def test_training_formats_use_the_benchmarks_own_words():
    """Two copies on purpose: what a researcher changes in the app must not change the measure."""
    assert TASKS["pubmedqa"].instruction == exam_formats.STATEMENT
    assert TASKS["medqa"].instruction == exam_formats.LICENSING_EXAM
    assert exam_formats.ENTRANCE_EXAM == TASKS["medmcqa"].instruction == TASKS["careqa"].instruction
    assert exam_formats.wrapped("prompt") == wrap("prompt")


@pytest.mark.skipif(not EVAL.is_dir(), reason="the benchmarks are not here")
def test_the_prompts_are_those_that_the_reference_was_asked():
    chosen = task("pubmedqa")
    questions = chosen.questions(rows_of(chosen, EVAL), from_hub=False)
    reference = json.loads((EVAL / "reference_generation_pubmedqa.json").read_text())
    assert [(q.prompt, q.gold) for q in questions] == [(r["prompt"], r["gold"]) for r in reference]
