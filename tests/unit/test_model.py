"""Base model and adapter: laid out as PEFT lays them out, and refused with a reason otherwise."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from app.adapter.checkpoint import save_checkpoint
from app.adapter.layout import Manifest, digest
from app.adapter.lora import lora_config
from app.config import LoraSettings, ModelSettings
from app.errors import AppError
from app.training.device import place
from app.training.model import (
    adapted_model,
    attach_adapter,
    flat_adapter,
    initial_adapter,
    load_adapter,
    load_base,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def settings(folder, *, quantization=0, r=4, targets="q_proj,v_proj", checkpointing=False):
    lora = LoraSettings(r=r, alpha=8, dropout=0.0, target_modules=targets)
    return ModelSettings(
        lora=lora,
        name=str(folder),
        quantization=quantization,
        gradient_checkpointing=checkpointing,
    )


@pytest.fixture
def cpu():
    return place({"cpus": 1, "gpu-device": ""})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(8)[None]).logits


def test_the_initial_adapter_has_pefts_own_layout(folder):
    flat, manifest = initial_adapter(settings(folder), seed=1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    theirs = get_peft_model_state_dict(get_peft_model(base, lora_config(settings(folder))))
    manifest.check(Manifest.of(theirs))
    assert flat.shape == (manifest.size,)


def test_the_initial_adapter_leaves_the_model_as_it_is(folder, cpu):
    flat, manifest = initial_adapter(settings(folder), seed=1)
    model = attach_adapter(load_base(settings(folder), cpu), settings(folder))
    load_adapter(model, flat, manifest)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model), logits(plain))
    assert np.count_nonzero(flat) > 0


def test_the_initial_adapter_comes_from_its_seed(folder):
    one, other = (digest(initial_adapter(settings(folder), seed)[0]) for seed in (1, 2))
    assert one == digest(initial_adapter(settings(folder), 1)[0])
    assert one != other


def test_what_is_loaded_is_what_is_read_back(folder, cpu):
    _, manifest = initial_adapter(settings(folder), seed=1)
    flat = np.random.default_rng(0).normal(size=manifest.size).astype(np.float32)
    model = adapted_model(settings(folder), cpu)
    load_adapter(model, flat, manifest)
    assert flat_adapter(model).tobytes() == flat.tobytes()


def test_an_adapter_of_another_rank_is_refused_by_name(folder, cpu):
    flat, manifest = initial_adapter(settings(folder, r=8), seed=1)
    model = adapted_model(settings(folder), cpu)
    with pytest.raises(AppError, match=r"differs at .*q_proj\.lora_A\.weight: expected \(4, 64\)"):
        load_adapter(model, flat, manifest)


def test_a_4_bit_base_answers_alike_before_and_after_an_adapter_is_loaded(folder, cpu):
    wanted = settings(folder, quantization=4)
    flat, manifest = initial_adapter(wanted, seed=1)
    model = attach_adapter(load_base(wanted, cpu), wanted)
    load_adapter(model, flat, manifest)
    before = logits(model)
    load_adapter(model, flat, manifest)
    assert torch.equal(logits(model), before)
    assert torch.allclose(before, model.train()(input_ids=torch.arange(8)[None]).logits, atol=1e-5)


def test_bitsandbytes_still_asks_each_layer_whether_to_lay_its_weights_out_anew(folder, cpu):
    layers = load_base(settings(folder, quantization=4), cpu).modules()
    quantized = [layer for layer in layers if isinstance(layer, Linear4bit)]
    assert quantized
    assert not any(layer.support_avx512bf16_for_cpu for layer in quantized)
    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(Linear4bit.forward)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_quantized_base_takes_the_same_adapter(folder, cpu, bits, checkpointing):
    wanted = settings(folder, quantization=bits, checkpointing=checkpointing)
    flat, manifest = initial_adapter(wanted, seed=1)
    model = attach_adapter(load_base(wanted, cpu), wanted)
    load_adapter(model, flat, manifest)
    assert torch.isfinite(logits(model)).all()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == len(manifest.shapes)
    assert all("lora_" in name for name in trainable)


def test_a_checkpoint_loads_with_plain_peft_and_changes_the_model(folder, tmp_path):
    _, manifest = initial_adapter(settings(folder), seed=1)
    flat = np.random.default_rng(0).normal(size=manifest.size).astype(np.float32)
    save_checkpoint(tmp_path / "peft_1", flat, manifest, settings(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(base)
    model = PeftModel.from_pretrained(base, tmp_path / "peft_1")
    assert flat_adapter(model).tobytes() == flat.tobytes()
    assert not torch.allclose(logits(model), before)
    config = json.loads((tmp_path / "peft_1" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_a_checkpoint_that_is_written_again_replaces_the_old_one_whole(folder, tmp_path):
    flat, manifest = initial_adapter(settings(folder), seed=1)
    for values in (flat, flat + 1):
        save_checkpoint(tmp_path / "peft_1", values, manifest, settings(folder))
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, tmp_path / "peft_1")
    assert flat_adapter(model).tobytes() == (flat + 1).tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["peft_1"]


def test_a_folder_without_a_model_is_refused_with_its_path(tmp_path):
    with pytest.raises(AppError, match=f"expected a model in {tmp_path}, found no config.json"):
        initial_adapter(settings(tmp_path), seed=1)


def test_an_unknown_local_model_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    with pytest.raises(AppError, match=f"{tmp_path}/models/no-such-model"):
        initial_adapter(settings("local/no-such-model"), seed=1)


def test_an_unknown_hub_model_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AppError, match="found 'no-such/model'") as caught:
        initial_adapter(settings("no-such/model"), seed=1)
    assert "\n" not in str(caught.value)


def test_target_modules_that_the_model_lacks_are_refused(folder):
    with pytest.raises(AppError, match=r"model\.lora\.target-modules.*found 'x_proj'"):
        initial_adapter(settings(folder, targets="x_proj"), seed=1)
