"""The held-out loss: by round, in the forms that are trained, on cards that nobody trains on."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from flwr.common.config import flatten_dict
from transformers import LlamaConfig, LlamaForCausalLM

from app.config import RunConfig
from app.server.holdout import Holdout
from app.training.model import initial_adapter
from tests.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
CARDS = [
    {"instruction": "Say", "input": f"What is {n}?", "output": f"Number {n} is a sign of {n % 7}."}
    for n in range(400)
]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A tiny model and 400 cards without a test split, by the names of a run config."""
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).save_pretrained(tmp_path / "models" / "tiny")
    tokenizer.save_pretrained(tmp_path / "models" / "tiny")
    cards = tmp_path / "datasets" / "cards" / "train.jsonl"
    cards.parent.mkdir(parents=True)
    cards.write_text("".join(json.dumps(card) + "\n" for card in CARDS))
    defaults = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    changes = {
        "model.name": "local/tiny",
        "model.quantization": 0,
        "static.dataset.name": "local/cards",
    }

    def make(**others):
        return RunConfig.parse(flatten_dict(defaults) | changes | others)

    return make


def test_every_round_is_measured_unless_a_run_asks_for_fewer(config):
    every = Holdout.load(config())
    assert all(every.due(n) for n in range(201))
    some = config(**{"evaluate.holdout-every-round": 20, "num-server-rounds": 50})
    assert [n for n in range(51) if Holdout.load(some).due(n)] == [0, 20, 40, 50]


def test_a_loss_belongs_to_its_adapter_not_to_the_one_measured_before(config):
    settings = config()
    holdout = Holdout.load(settings)
    assert holdout.examples == 8  # 2 % of 400
    flat, manifest = initial_adapter(settings.model, seed=1)
    trained = flat + 0.5
    before = holdout.loss(flat, manifest)
    assert holdout.loss(trained, manifest) != before
    assert holdout.loss(flat, manifest) == before
    assert Holdout.load(settings).loss(trained, manifest) == holdout.loss(trained, manifest)


def test_cards_are_held_out_in_the_forms_that_are_trained(config):
    flat, manifest = initial_adapter(config().model, seed=1)
    as_cards, as_exam = (
        Holdout.load(config(**{"train.answer-formats": share})).loss(flat, manifest)
        for share in (0.0, 1.0)
    )
    assert as_cards != as_exam


def test_no_cards_are_held_out_where_a_run_asks_for_none(config):
    assert Holdout.load(config(**{"evaluate.holdout-examples": 0})) is None
