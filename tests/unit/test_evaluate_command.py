"""``medfed evaluate`` and ``medfed score``: what a user who got something wrong is told."""

from __future__ import annotations

import json
import sys

import pytest

from medfed.cli import main
from tests.tiny_model import save_adapter, save_tiny_model

QUESTION = {"question": "Which?", "op1": "w", "op2": "x", "op3": "y", "op4": "z", "cop": 2}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def medfed(monkeypatch, tmp_path, capsys):
    """Run the command; return its exit status, standard output and standard error."""
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "home"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["medfed", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def one_clear_line(result, complaint):
    status, out, err = result
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (status, out, len(errors)) == (1, "", 1), err
    assert "Traceback" not in err
    assert complaint in errors[0]
    assert "\nhint: " in err


def data(folder, text):
    folder.mkdir()
    (folder / "careqa.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "expected questions in"),
        ("not json", "line 1"),
        ('{"question": "q", "answer": "A"}', "found no op1 in row 1"),
        (json.dumps({**QUESTION, "cop": 9}), "found 'cop 9' in row 1"),
    ],
)
def test_an_empty_file_or_another_schema_is_one_line(medfed, tiny, tmp_path, text, complaint):
    folder = data(tmp_path / "data", text)
    result = medfed("evaluate", "--model", tiny, "--benchmarks", "careqa", "--data", folder)
    one_clear_line(result, complaint)


def test_a_missing_data_set_is_one_line(medfed, tiny, tmp_path):
    ask = ("evaluate", "--model", tiny, "--benchmarks", "careqa", "--data")
    one_clear_line(medfed(*ask, tmp_path / "none"), "found none at")
    (tmp_path / "empty").mkdir()
    one_clear_line(medfed(*ask, tmp_path / "empty"), "expected one file careqa*.jsonl")


def test_an_unreachable_hub_is_one_line(medfed, tiny, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    result = medfed("evaluate", "--model", tiny, "--benchmarks", "medqa")
    one_clear_line(result, "no way to it (no route to host)")


def test_an_adapter_of_another_model_is_one_line(medfed, tiny, tmp_path):
    folder = data(tmp_path / "data", json.dumps(QUESTION))
    adapter = save_adapter(tmp_path, "someone/else", hidden=32)
    ask = ("evaluate", "--adapter", adapter, "--model", tiny, "--benchmarks", "careqa")
    of_data = ("--data", folder, "--quantization", "0")
    one_clear_line(medfed(*ask, *of_data), "found one of someone/else")
    one_clear_line(medfed(*ask, *of_data, "--any-base"), "expected an adapter that fits")


def test_a_folder_that_is_no_adapter_is_one_line(medfed, tmp_path):
    folder = data(tmp_path / "data", json.dumps(QUESTION))
    ask = ("evaluate", "--benchmarks", "careqa", "--data", folder, "--adapter", tmp_path / "none")
    one_clear_line(medfed(*ask), "expected an adapter, found no such file")


def test_an_unknown_benchmark_or_no_model_is_one_line(medfed, tiny):
    one_clear_line(medfed("evaluate", "--model", tiny, "--benchmarks", "usmle"), "found 'usmle'")
    one_clear_line(medfed("evaluate"), "found neither --model nor --adapter")


@pytest.mark.parametrize(
    ("text", "complaint"), [("", "an empty file"), ("[]", "an empty list"), ("{", "line 1")]
)
def test_generations_that_cannot_be_scored_are_one_line(medfed, tmp_path, text, complaint):
    (tmp_path / "generation.jsonl").write_text(text)
    ask = ("score", "--benchmark", "medqa", "--generations", tmp_path / "generation.jsonl")
    one_clear_line(medfed(*ask), complaint)


def test_generations_that_are_not_there_are_one_line(medfed, tmp_path):
    ask = ("score", "--benchmark", "medqa", "--generations", tmp_path / "none.jsonl", "--json")
    one_clear_line(medfed(*ask), "none that can be read")


def test_a_report_on_standard_output_is_json_alone(medfed, tiny, tmp_path):
    folder = data(tmp_path / "data", json.dumps(QUESTION) + "\n")
    ask = ("evaluate", "--model", tiny, "--benchmarks", "careqa", "--data", folder)
    status, out, _ = medfed(*ask, "--quantization", "0", "--json")
    assert status == 0
    assert json.loads(out)["benchmarks"][0]["n"] == 1


def test_an_adapter_answers_alike_whether_or_not_its_base_has_answered_before_it(medfed, tmp_path):
    """Also where bitsandbytes computes 4 bits by its own kernels, which lay weights out anew."""
    rows = [{**QUESTION, "question": f"Which {n}?"} for n in range(16)]
    folder = data(tmp_path / "data", "".join(json.dumps(row) + "\n" for row in rows))
    adapter = save_adapter(tmp_path, tmp_path / "model", hidden=128)
    ask = ("evaluate", "--adapter", adapter, "--benchmarks", "careqa", "--packed")
    found = {}
    for order in ("--base", "--no-base"):
        status, _, err = medfed(*ask, "--data", folder, order, "--output", tmp_path / order)
        assert status == 0, err
        found[order] = (tmp_path / order / "generation_careqa_peft_3.jsonl").read_text()
    assert found["--base"] == found["--no-base"]
