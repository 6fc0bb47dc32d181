"""A Llama of two small layers with SmolLM2's tokenizer: real in kind, trained in a second."""

from __future__ import annotations

from pathlib import Path

from embedded import model as embedded_model
from medfed.paths import Home

# Rounds of a second or two.
CONFIG = {
    "model.name": "local/tiny",
    "static.dataset.name": "local/hpo-flashcards",
    "model.quantization": 0,
    "train.training-arguments.max-steps": 2,
    "train.training-arguments.per-device-train-batch-size": 4,
}


def small_home(root: Path) -> Home:
    """A home with the prepared cards and partitions, and the model as ``local/tiny``."""
    home = sharing_cards(root)
    save_small_llama(home.models / "tiny", Home.from_environment().models / embedded_model.NAME)
    return home


def sharing_cards(root: Path) -> Home:
    """A home with the prepared cards and partitions, and no model."""
    prepared, home = Home.from_environment(), Home(root)
    home.models.mkdir(parents=True)
    for folder in (prepared.datasets, prepared.partitions):
        (home.root / folder.name).symlink_to(folder)
    return home


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
