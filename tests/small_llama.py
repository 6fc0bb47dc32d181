"""A Llama of two small layers with SmolLM2's tokenizer: real in kind, trained in a second."""

from __future__ import annotations

from pathlib import Path


def save_small_llama(folder: Path, tokenizer: Path) -> None:
    """Write the model into ``folder``, with the tokenizer that lies in ``tokenizer``."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
