"""A language model and an adapter of it on disk, small enough to be asked in a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evaluation.model import load_subject

if TYPE_CHECKING:
    from pathlib import Path


def save_tiny_model(folder: Path, hidden: int = 64, seed: int = 0) -> Path:
    """A byte-level tokenizer and a random Llama: long answers, many tokens a word."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        additional_special_tokens=special,
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(special) + len(alphabet),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.5,  # livelier than usual: answers that depend on the prompt
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    ).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path | str, hidden: int = 64) -> Path:
    """An adapter that changes answers; its config names ``base`` as the model it belongs to."""
    subject = load_subject(str(save_tiny_model(folder / "model", hidden)), 0)
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapter = get_peft_model(subject.model, config)
    adapter.peft_config["default"].base_model_name_or_path = str(base)
    adapter.save_pretrained(folder / "peft_3")
    return folder / "peft_3"
