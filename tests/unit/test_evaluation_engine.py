"""The engine: whatever it does to be fast, it says what the one-by-one loop says."""

from __future__ import annotations

import copy
import dataclasses
import json
import random

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from hypothesis import given
from hypothesis import strategies as st

from common.errors import EvaluationError
from evaluation import run
from evaluation.catalogue import task, tasks
from evaluation.generate import (
    Engine,
    Request,
    batches_by_length,
    first_tokens,
    one_by_one,
    shared_prefix,
    why_one_by_one,
)
from evaluation.journal import Journal
from evaluation.model import load_subject, with_adapter
from evaluation.prompts import next_token_logits, prompt_attention, read_prefix
from evaluation.run import Plan, as_generations, evaluate, requests_for
from evaluation.scorer import read_generations
from evaluation.task import Question, wrap
from tests.tiny_model import save_adapter, save_tiny_model

OPTIONS = ("A", "B", "C", "D")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices gain nothing from more, and lose much where other work is going on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def subject(tiny):
    return load_subject(str(tiny), 0)


def prompts(n, seed=0):
    rng = random.Random(seed)
    words = ["renal", "acute", "fever", "x", "the", "diagnosis", "42", "é"]
    return [
        "Instruction for all.\n" + " ".join(rng.choices(words, k=rng.randint(1, 30)))
        for _ in range(n)
    ]


def all_answers(engine, requests):
    return {n: answer for batch in engine.answers(requests) for n, answer in batch.items()}


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_batches_say_what_the_loop_says(subject, batch_tokens):
    requests = [Request(text, 1 + i % 4) for i, text in enumerate(prompts(24))]
    answers = all_answers(Engine(subject, OPTIONS, batch_tokens=batch_tokens), requests)
    said = [one_by_one(subject, request) for request in requests]
    assert [answers[n].output for n in range(24)] == said
    assert len(set(said)) > 5  # not a model that always says the same


def test_scores_do_not_depend_on_the_batch(subject):
    requests = [Request(text, 1) for text in prompts(12)]
    together = all_answers(Engine(subject, OPTIONS), requests)
    for n, request in enumerate(requests):
        alone = all_answers(Engine(subject, OPTIONS), [request])[0]
        assert together[n].scores == pytest.approx(alone.scores, abs=1e-4)


@pytest.mark.parametrize("shared", [0, 5], ids=["no prefix", "a shared prefix"])
def test_logits_of_packed_prompts_are_the_models_own(subject, shared):
    model = copy.deepcopy(subject.model).double()  # so that one score too few would be seen
    prefix = [7] * shared
    rows = [[n % 97 + 3 for n in range(start, start + length)]
            for start, length in ((0, 1), (5, 63), (11, 64), (3, 65), (2, 900))]  # fmt: skip
    with torch.inference_mode():
        own = [model(torch.tensor([prefix + row])).logits[0, -1] for row in rows]
        with prompt_attention(model):
            found = next_token_logits(model, read_prefix(model, prefix), rows)
    torch.testing.assert_close(found, torch.stack(own), atol=1e-9, rtol=0)
    assert found.std() > 0.1


def test_what_is_too_close_to_call_is_asked_alone(subject):
    requests = [Request(text, 2) for text in prompts(6)]
    every = all_answers(Engine(subject, OPTIONS, near_tie=1e9), requests)
    none = all_answers(Engine(subject, OPTIONS, near_tie=0.0), requests)
    assert all(answer.alone for answer in every.values())
    assert not any(answer.alone for answer in none.values())
    assert [every[n].output for n in range(6)] == [none[n].output for n in range(6)]


def test_the_model_and_the_threads_are_as_they_were_afterwards(subject):
    torch.set_num_threads(2)
    try:
        before = subject.model.config._attn_implementation
        answering = Engine(subject, OPTIONS, batch_tokens=60).answers(
            [Request(text, 1) for text in prompts(6)]
        )
        next(answering)
        assert (torch.get_num_threads(), subject.model.config._attn_implementation) != (2, before)
        answering.close()  # cut off between two batches
        assert (torch.get_num_threads(), subject.model.config._attn_implementation) == (2, before)
    finally:
        torch.set_num_threads(1)


def test_two_cores_say_what_one_says(subject):
    requests = [Request(text, 2) for text in prompts(20)]
    one = all_answers(Engine(subject, OPTIONS, batch_tokens=60), requests)
    torch.set_num_threads(2)
    try:
        two = all_answers(Engine(subject, OPTIONS, batch_tokens=60), requests)
    finally:
        torch.set_num_threads(1)
    assert [two[n].output for n in range(20)] == [one[n].output for n in range(20)]


@pytest.mark.parametrize(
    ("name", "value"), [("sliding_window", 64), ("attn_logit_softcapping", 30.0)]
)
def test_a_model_that_attends_in_another_way_is_asked_one_by_one(subject, monkeypatch, name, value):
    monkeypatch.setattr(subject.model.config, name, value, raising=False)
    assert f"sets {name} to {value}" in why_one_by_one(subject)
    requests = [Request(text, 2) for text in prompts(3)]
    assert all(answer.alone for answer in all_answers(Engine(subject, OPTIONS), requests).values())


def test_an_answer_ends_at_the_end_of_text(subject, monkeypatch):
    """Whatever the model says first is declared to be an end: nothing may follow it."""
    request = Request(prompts(1)[0], 5)
    ids = subject.tokenizer.encode(wrap(request.prompt), return_tensors="pt")
    first = int(subject.model(input_ids=ids).logits[0, -1].argmax())
    unstopped = one_by_one(subject, request)
    monkeypatch.setattr(subject.model.generation_config, "eos_token_id", [2, first])
    answer = all_answers(Engine(subject, OPTIONS), [request, Request(prompts(2)[1], 5)])[0]
    assert answer.output == one_by_one(subject, request) == subject.tokenizer.decode([first])
    assert answer.output != unstopped


def test_a_model_whose_greedy_search_is_not_plain_is_asked_one_by_one(subject, monkeypatch):
    monkeypatch.setattr(subject.model.generation_config, "repetition_penalty", 1.3)
    assert "repetition_penalty" in why_one_by_one(subject)
    requests = [Request(text, 3) for text in prompts(4)]
    answers = all_answers(Engine(subject, OPTIONS), requests)
    assert [answers[n].output for n in range(4)] == [one_by_one(subject, r) for r in requests]


def test_eight_bits_are_asked_one_by_one(subject):
    assert why_one_by_one(subject) is None
    assert "8-bit" in why_one_by_one(dataclasses.replace(subject, quantization=8))


def test_answers_that_begin_alike_cannot_be_ranked(subject):
    with pytest.raises(EvaluationError, match="tell no, none apart"):
        first_tokens(subject.tokenizer, ("no", "none"))


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=6),
    st.lists(st.integers(0, 2), max_size=4),
)
def test_the_shared_prefix_is_common_and_leaves_everyone_something(tails, head):
    sequences = [head + tail for tail in tails]
    n = shared_prefix(sequences)
    assert len(head) <= n < min(map(len, sequences))
    assert len({tuple(s[:n]) for s in sequences}) == 1


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_every_sequence_is_in_one_batch_that_fits(lengths, batch_tokens):
    batches = batches_by_length(lengths, batch_tokens)
    assert sorted(n for batch in batches for n in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[n] for n in batch) <= batch_tokens


def test_an_answer_may_be_as_long_as_the_gold_of_its_batchs_first_row(subject):
    golds = ["yes", *["no"] * 15, "maybe", "no"]
    questions = [Question(f"q{i}", gold) for i, gold in enumerate(golds)]
    budgets = [r.max_new_tokens for r in requests_for(questions, subject.tokenizer)]
    assert budgets == [3] * 16 + [5] * 2


def test_of_equal_prompts_the_last_output_stands_for_all():
    questions = [Question("p", "A"), Question("q", "A"), Question("p", "B")]
    assert [g.output for g in as_generations(questions, ["1", "2", "3"])] == ["3", "2", "3"]


# A whole evaluation.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {"question": text, "op1": "w", "op2": "x", "op3": "y", "op4": "z", "cop": 1 + i % 4}
        for i, text in enumerate(prompts(10))
    ]
    (folder / "careqa.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter"), tiny)


def plan(tiny, data, output, **changes):
    whole = Plan(
        model=str(tiny),
        adapter=None,
        tasks=tuple(tasks("careqa")),
        data=data,
        limit=None,
        quantization=0,
        output=output,
        run_name="fl",
    )
    return dataclasses.replace(whole, **changes)


def test_an_evaluation_compares_adapter_and_base_and_leaves_the_leaderboards_files(
    tiny, data, adapter, tmp_path
):
    seen = []
    report = evaluate(plan(tiny, data, tmp_path, adapter=adapter), seen.append)
    (entry,) = report["benchmarks"]
    assert entry["n"] == entry["base"]["n"] == 10
    for name, figures in (("fl", entry), ("fl-base", entry["base"])):
        generations = read_generations(tmp_path / f"generation_careqa_{name}.jsonl", task("careqa"))
        assert len(generations) == 10
        text = (tmp_path / f"acc_careqa_{name}.txt").read_text()
        assert text == f"Accuracy: {figures['accuracy']}. "
    paired = entry["against_base"]["leaderboard"]
    assert paired["gained"] - paired["lost"] == entry["correct"] - entry["base"]["correct"]
    assert json.loads((tmp_path / "report_fl.json").read_text()) == report
    assert (seen[-1].done, seen[-1].total) == (10, 10)


def test_an_adapter_changes_the_answers(tiny, data, adapter, tmp_path):
    evaluate(plan(tiny, data, tmp_path, adapter=adapter))
    tuned, base = (
        (tmp_path / f"generation_careqa_{name}.jsonl").read_text() for name in ("fl", "fl-base")
    )
    assert tuned != base


def test_an_evaluation_that_was_cut_off_goes_on_where_it_stopped(tiny, data, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.generate.BATCH_TOKENS", {"cpu": 600, "cuda": 600})
    whole = evaluate(plan(tiny, data, tmp_path / "whole"))["benchmarks"][0]

    class PowerCutError(Exception):
        pass

    def cut(progress):
        if progress.done >= 3:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        evaluate(plan(tiny, data, tmp_path / "cut"), cut)
    assert not list((tmp_path / "cut").glob("acc_*"))
    (journal,) = (tmp_path / "cut/journal").iterdir()
    with journal.open("a") as file:
        file.write('{"n": 9, "outp')  # the line that was being written
    resumed = evaluate(plan(tiny, data, tmp_path / "cut"))["benchmarks"][0]
    assert 3 <= resumed["resumed"] < 10
    for key in ("accuracy", "outputs", "among_options"):
        assert resumed[key] == whole[key]
    again = evaluate(plan(tiny, data, tmp_path / "cut"))["benchmarks"][0]
    assert again["resumed"] == 10


def test_a_batch_that_is_all_too_close_to_call_is_resumed_like_any_other(
    tiny, data, tmp_path, monkeypatch
):
    engine = run.Engine
    monkeypatch.setattr(run, "Engine", lambda *a: engine(*a, batch_tokens=60, near_tie=1e9))
    whole = evaluate(plan(tiny, data, tmp_path))["benchmarks"][0]
    assert whole["decided_alone"] == 10
    again = evaluate(plan(tiny, data, tmp_path))["benchmarks"][0]
    assert (again["resumed"], again["accuracy"]) == (10, whole["accuracy"])


def test_a_damaged_journal_is_named_in_one_line(tmp_path):
    journal = Journal(tmp_path, "medqa", "model", [Request("p", 1)], OPTIONS)
    journal.path.write_text('{"n": 0, "output": "A", "scores": [], "alone": false}\n{"n": 1}\n')
    with pytest.raises(EvaluationError, match="on line 2 of"):
        journal.read()


def test_another_model_or_another_question_has_a_journal_of_its_own(tmp_path):
    one = Journal(tmp_path, "medqa", "model", [Request("p", 1)], OPTIONS).path
    others = {
        Journal(tmp_path, "medqa", "model2", [Request("p", 1)], OPTIONS).path,
        Journal(tmp_path, "medqa", "model", [Request("q", 1)], OPTIONS).path,
        Journal(tmp_path, "medqa", "model", [Request("p", 2)], OPTIONS).path,
    }
    assert len(others - {one}) == 3


def test_a_limit_keeps_the_first_questions(tiny, data, tmp_path):
    assert evaluate(plan(tiny, data, tmp_path, limit=4))["benchmarks"][0]["n"] == 4


def test_missing_data_is_noticed_before_a_model_is_loaded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_subject", lambda *_: pytest.fail("loaded"))
    (tmp_path / "careqa.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="empty file"):
        evaluate(plan(tiny, tmp_path, tmp_path))


def test_an_adapter_of_another_model_is_refused(tiny, tmp_path):
    other = save_adapter(tmp_path, "someone/else", hidden=32)
    with pytest.raises(EvaluationError, match="found one of someone/else"):
        with_adapter(load_subject(str(tiny), 0), other, str(tiny))
    with pytest.raises(EvaluationError, match="that fits") as caught:
        with_adapter(load_subject(str(tiny), 0), other, str(tiny), any_base=True)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_is_none_is_refused(tiny, adapter, tmp_path):
    for file, text, complaint in (
        ("adapter_config.json", "", "empty file"),
        ("adapter_config.json", "{", "expected JSON"),
        ("adapter_model.safetensors", "not tensors", "that fits"),
    ):
        broken = tmp_path / f"{file}-{len(text)}"
        broken.mkdir()
        for part in adapter.iterdir():
            if part.is_file():
                (broken / part.name).write_bytes(part.read_bytes())
        (broken / file).write_text(text)
        with pytest.raises(EvaluationError, match=complaint):
            with_adapter(load_subject(str(tiny), 0), broken, str(tiny))
    with pytest.raises(EvaluationError, match="no such file"):
        with_adapter(load_subject(str(tiny), 0), tmp_path / "none", str(tiny))


def test_a_model_that_is_none_and_an_odd_quantization_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="found 5"):
        load_subject(str(tmp_path), 5)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EvaluationError, match="can be loaded"):
        load_subject(str(tmp_path), 0)


def test_dequantized_four_bit_weights_are_the_numbers_that_quantized_ones_stand_for(tiny):
    packed, unpacked = (load_subject(str(tiny), 4, unpack=unpack) for unpack in (False, True))
    layer = packed.model.model.layers[0].self_attn.q_proj.weight
    numbers = dequantize_4bit(layer.data, layer.quant_state)
    assert torch.equal(numbers, unpacked.model.model.layers[0].self_attn.q_proj.weight)
    requests = [Request(text, 2) for text in prompts(8)]
    answers = all_answers(Engine(unpacked, OPTIONS), requests)
    assert [answers[n].output for n in range(8)] == [one_by_one(unpacked, r) for r in requests]


def test_packed_weights_on_a_cpu_are_asked_one_by_one(tiny):
    assert "bfloat16" in why_one_by_one(load_subject(str(tiny), 4, unpack=False))
    assert why_one_by_one(load_subject(str(tiny), 4)) is None
