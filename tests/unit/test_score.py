"""The scorer: the leaderboard's count to the letter, and the errors of a wrong file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import EvaluationError
from evaluation.catalogue import TASKS, task
from evaluation.scorer import (
    Generation,
    best_constant,
    is_correct,
    is_valid,
    read_generations,
    score,
)
from evaluation.statistics import mcnemar, mean_of_proportions, wilson
from medfed.commands.evaluate import ALL_BENCHMARKS
from medfed.commands.evaluate import score as score_command

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT.parent / "shared/data/eval/reference_generation_pubmedqa.json"


@pytest.mark.parametrize(
    ("output", "gold", "boolean", "correct"),
    [
        ("A", "A", False, True),
        ("b", "B", False, True),
        ("B. Because", "B", False, True),
        ("(C)", "C", False, True),
        ("Based", "B", False, True),  # the first letter is all that the leaderboard reads
        ("The", "A", False, False),
        ("", "A", False, False),
        ("E", "E", False, True),
        ("Yes", "yes", True, True),
        (" no.", "no", True, True),
        ("YesYes", "yes", True, True),
        ("yesno", "yes", True, True),
        ("noyes", "no", True, True),
        ("nono", "no", True, True),
        ("Yes, it is", "yes", True, False),
        ("Maybe", "maybe", True, True),
        ("maybe.", "maybe", True, False),  # no clean-up for what is not recognised
        ("text\n## B\nmore", "B", False, True),
        ("text\n##\nB", "B", False, False),
        ("d", "so the answer is: d ### end", False, True),
        ("d", "so the answer: d ### end", False, False),
        ("é A", "a", False, True),
    ],
)
def test_an_answer_counts_as_the_leaderboard_counts_it(output, gold, boolean, correct):
    assert is_correct(output, gold, boolean=boolean) is correct


@pytest.mark.parametrize(
    ("output", "valid"),
    [("A", True), (" b.", True), ("Based", False), ("", False), ("The A", False)],
)
def test_a_valid_answer_begins_with_one_of_the_answers_as_a_word(output, valid):
    assert is_valid(output, "ABCD") is valid


def test_luck_of_format_is_told_apart_from_an_answer():
    generations = [Generation("p", "B", "Based"), Generation("p", "B", "B")]
    result = score(task("medqa"), generations)
    assert (result.accuracy, result.valid, result.lucky) == (1.0, 0.5, 0.5)


def test_the_trivial_baseline_is_the_best_constant_answer():
    assert best_constant(task("pubmedqa"), ["no", "no", "yes", "maybe"]) == ("no", 0.5)


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the reference's generations are not here")
def test_the_references_own_generations_score_what_it_published():
    chosen = task("pubmedqa")
    result = score(chosen, read_generations(REFERENCE, chosen))
    assert (result.n, result.accuracy) == (500, 0.542)
    assert (result.trivial_answer, result.trivial_accuracy) == ("yes", 0.552)


@pytest.mark.parametrize("lines", [False, True])
def test_array_and_lines_score_alike(lines, tmp_path, capsys):
    rows = [{"prompt": "p", "gold": g, "output": o} for g, o in [("A", "A"), ("B", "The")]]
    path = tmp_path / "generation.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows))
    score_command("medmcqa", path, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["benchmark"], printed["n"], printed["accuracy"]) == ("medmcqa", 2, 0.5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "empty file"),
        ("[]", "empty list"),
        ("[{", "JSON array"),
        ("{}\n{", "line 2"),
        ('{"question": "q"}', "found question"),
        ('{"prompt": "p", "gold": null, "output": "A"}', "record 1"),
        ("[1]", "found int"),
        ('{"prompt": "p", "gold": "yes", "output": "A"}', "out of A, B, C, D, E"),
    ],
)
def test_a_file_that_cannot_be_scored_is_named_in_one_line(text, complaint, tmp_path):
    path = tmp_path / "generation.jsonl"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=complaint) as caught:
        read_generations(path, task("medqa"))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_benchmark_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="none that can be read"):
        read_generations(tmp_path / "none.jsonl", task("medqa"))
    with pytest.raises(EvaluationError, match="found 'medicine'"):
        task("medicine")


def test_the_command_offers_every_benchmark():
    assert ALL_BENCHMARKS.split(",") == list(TASKS)


def test_scoring_needs_no_torch():
    code = (
        "import sys, evaluation.scorer, evaluation.catalogue, medfed.commands.evaluate;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"


def test_the_interval_is_wilsons():
    low, high = wilson(271, 500)
    assert (round(low, 4), round(high, 4)) == (0.4982, 0.5852)


@given(n=st.integers(1, 500), data=st.data())
def test_an_interval_holds_its_proportion(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1


def test_a_paired_test_looks_at_the_questions_answered_differently():
    ours, theirs = [True] * 8 + [False] * 2, [False] * 8 + [True] * 2
    paired = mcnemar(ours, theirs)
    assert (paired.gained, paired.lost) == (8, 2)
    assert paired.p_value == pytest.approx(0.109375)  # 2 * (1 + 10 + 45) / 1024
    assert mcnemar([True] * 5, [True] * 5).p_value == 1.0


def test_the_average_weighs_every_benchmark_alike():
    mean, low, high = mean_of_proportions([(1, 2), (0, 100)])
    assert mean == 0.25
    assert low < mean < high
