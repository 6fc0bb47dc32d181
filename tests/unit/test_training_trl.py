"""The stock pipeline of today: TRL's SFTTrainer with loss on completions only."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_training import VOCABULARY, cards, run, tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

CARDS = cards([9, 30, 14, 22, 6, 17, 12], [4, 11, 6, 20, 2, 3, 1])


def tokenizer():
    """SFTTrainer wants one, though these cards are tokens already."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        pad_token="w0",
        eos_token="w1",
        unk_token="w0",
    )


def sft_losses(model, folder, examples, words, **choices):
    rows = {
        "input_ids": [list(ids) for ids, _ in examples],
        "completion_mask": [[0] * prompt + [1] * (len(ids) - prompt) for ids, prompt in examples],
    }
    trainer = SFTTrainer(
        model=model,
        train_dataset=Dataset.from_dict(rows),
        processing_class=words,
        args=SFTConfig(
            output_dir=str(folder),
            completion_only_loss=True,
            max_length=512,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **choices,
        ),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_follows_trl_s_sft_trainer_step_by_step(tmp_path):
    expected = sft_losses(
        tiny_model(torch.float32),
        tmp_path,
        CARDS,
        tokenizer(),
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        seed=11,
    )
    result = run(tiny_model(torch.float32), CARDS, steps=5, order_seed=11)
    assert len(set(expected)) == 5
    assert result.step_losses == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def real():
    """The embedded model and 8 of the embedded cards, in the template of the reference."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from app.cards.tokens import card_text, tokenize_texts
    from embedded import flashcards, model
    from medfed.paths import Home

    home = Home.from_environment()
    model.prepare(home.models)
    flashcards.prepare(home.datasets)
    words = AutoTokenizer.from_pretrained(home.models / model.NAME)
    words.pad_token = words.eos_token
    with (home.datasets / "hpo-flashcards" / "train.jsonl").open() as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 8)]
    texts = [card_text(row["input"], row["output"], row["instruction"]) for row in rows]

    def fresh_model():
        base = AutoModelForCausalLM.from_pretrained(home.models / model.NAME, dtype=torch.float32)
        torch.manual_seed(0)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        return get_peft_model(base, lora)

    return fresh_model, words, tokenize_texts(texts, words, 512)


@pytest.mark.weights
def test_training_follows_trl_on_real_cards_and_weights(tmp_path, real):
    fresh_model, words, examples = real
    steps = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 2e-4, "seed": 11}
    expected = sft_losses(fresh_model(), tmp_path, examples, words, **steps)
    result = run(fresh_model(), examples, steps=2, batch_size=4, learning_rate=2e-4, order_seed=11)
    assert expected[0] != expected[1]
    # Of the loss: TRL sums hundreds of labels in float32, and its own last digits are not exact.
    assert result.step_losses == pytest.approx(expected, rel=1e-5)
