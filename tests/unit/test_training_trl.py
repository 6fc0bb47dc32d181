"""The stock pipeline of today: TRL's SFTTrainer with loss on completions only."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
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


def sft_losses(model, folder, **choices):
    rows = {
        "input_ids": [list(ids) for ids, _ in CARDS],
        "completion_mask": [[0] * prompt + [1] * (len(ids) - prompt) for ids, prompt in CARDS],
    }
    trainer = SFTTrainer(
        model=model,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer(),
        args=SFTConfig(
            output_dir=str(folder),
            completion_only_loss=True,
            max_length=64,
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
        max_steps=5,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        seed=11,
    )
    result = run(tiny_model(torch.float32), CARDS, steps=5, order_seed=11)
    assert len(set(expected)) == 5
    assert result.step_losses == pytest.approx(expected, abs=1e-5)
