from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.training import EQUAL, Job, compare, main, measure


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A model of a few thousand weights whose tokens are bytes, and five cards."""
    folder = tmp_path_factory.mktemp("benchmark")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[0]).save_pretrained(
        folder
    )
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    cards = folder / "train.jsonl"
    rows = [
        {"instruction": "", "input": f"What is {name}?", "output": name * length}
        for length, name in enumerate(("anosmia", "ataxia", "ptosis", "uvulitis", "goitre"), 2)
    ]
    cards.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Job(
        pipeline="stock",
        model=str(folder),
        tokenizer=str(folder),
        cards=str(cards),
        limit=5,
        steps=3,
        batch_size=2,
        seq_length=220,
        full_length=False,
        quantization=0,
        dropout=0.0,
        checkpointing=True,
        seed=1,
    )


def with_pipeline(job, pipeline, **changes):
    return Job(**{**vars(job), "pipeline": pipeline, **changes})


def test_every_pipeline_trains_the_same_cards_to_the_same_loss(job):
    stock = measure(job, lambda step, loss: None)
    ours = measure(with_pipeline(job, "ours", checkpointing=False), lambda step, loss: None)
    trl = measure(with_pipeline(job, "trl"), lambda step, loss: None)
    found = compare(stock, ours)
    assert found["equal_loss"]
    assert trl["loss_per_step"] == pytest.approx(stock["loss_per_step"], abs=EQUAL)
    assert len(set(stock["loss_per_step"])) == 3
    assert found["speed_ratio"] == ours["examples_per_s"] / stock["examples_per_s"]
    assert found["memory_ratio"] > 0


def test_losses_that_differ_are_not_called_equal(job):
    stock = measure(job, lambda step, loss: None)
    other = measure(with_pipeline(job, "ours", seed=2), lambda step, loss: None)
    assert not compare(stock, other)["equal_loss"]


def test_without_weights_the_benchmark_says_which_command_fetches_them(tmp_path):
    with pytest.raises(SystemExit, match="hint: run medfed prepare"):
        main(["--model", str(tmp_path)])
