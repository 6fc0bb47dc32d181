"""Fused steps against transformers' own, in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.llama import modeling_llama
from transformers.models.llama.configuration_llama import LlamaConfig

from app.training.fused import fused, normalise, rotate

CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
)


def double(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def same(ours, theirs, inputs):
    """Equal values, and equal gradients of a sum in which each value weighs differently."""
    found = []
    for outputs in (ours, theirs):
        weights = [double(*output.shape).detach() for output in outputs]
        total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
        found.append(torch.autograd.grad(total, inputs))
    for one, other in zip((*ours, *found[0]), (*theirs, *found[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_norm_is_transformers_norm():
    module = modeling_llama.LlamaRMSNorm(24, eps=1e-5).double()
    module.weight.data.uniform_(0.5, 1.5)
    module.requires_grad_(False)
    hidden = double(2, 7, 24)
    # transformers normalises in float32, whatever it is given
    variance = hidden.pow(2).mean(-1, keepdim=True)
    theirs = module.weight * (hidden * torch.rsqrt(variance + module.variance_epsilon))
    same([normalise(hidden, module.weight, 1e-5)], [theirs], [hidden])
    torch.testing.assert_close(
        normalise(hidden, module.weight, 1e-5), module(hidden), rtol=1e-6, atol=1e-6
    )


def test_the_rotation_is_transformers_rotation():
    q, k = double(1, 3, 7, 8), double(1, 1, 7, 8)
    angles = torch.arange(7.0, dtype=torch.float64)[:, None] * torch.logspace(0, -2, 4)[None]
    table = torch.cat((angles, angles), dim=-1)[None]
    theirs = modeling_llama.apply_rotary_pos_emb(q, k, table.cos(), table.sin())
    same(rotate(q, k, table.cos(), table.sin()), theirs, [q, k])


def test_the_gate_is_transformers_gate():
    module = modeling_llama.LlamaMLP(CONFIG).double().requires_grad_(False)
    hidden = double(2, 7, 24)
    theirs = module(hidden)
    with fused(module):
        ours = module(hidden)
    same([ours], [theirs], [hidden])


def adapted(**changes):
    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(24, 40)),
        LoraConfig(r=4, lora_alpha=9, target_modules=["0"], init_lora_weights=False, **changes),
    )
    return model.double(), model.base_model.model[0]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_adapted_product_is_peft_s(dropout):
    model, layer = adapted(lora_dropout=dropout)
    hidden = double(2, 7, 24)
    inputs = [hidden, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    torch.manual_seed(1)  # of the dropout
    theirs = layer(hidden)
    torch.manual_seed(1)
    with fused(model):
        assert "forward" in vars(layer)
        ours = layer(hidden)
    same([ours], [theirs], inputs)


def test_an_adapter_of_another_kind_is_left_to_peft():
    for model, layer in (adapted(use_dora=True), adapted(lora_bias=True)):
        with fused(model):
            assert "forward" not in vars(layer)


def test_what_is_replaced_is_put_back():
    model = modeling_llama.LlamaForCausalLM(CONFIG).requires_grad_(False)
    before = modeling_llama.apply_rotary_pos_emb
    norm = model.model.norm
    with fused(model):
        assert modeling_llama.apply_rotary_pos_emb is rotate
        assert "forward" in vars(norm)
    assert modeling_llama.apply_rotary_pos_emb is before
    assert "forward" not in vars(norm)


def test_a_norm_that_is_trained_is_left_alone():
    norm = modeling_llama.LlamaRMSNorm(24)
    with fused(norm):
        assert "forward" not in vars(norm)


def test_the_installed_transformers_still_has_what_is_replaced():
    """Else the fused steps would no longer be used, and nobody would notice but by the clock."""
    model = modeling_llama.LlamaForCausalLM(CONFIG).requires_grad_(False)
    with fused(model):
        replaced = [type(m).__name__ for m in model.modules() if "forward" in vars(m)]
        assert modeling_llama.apply_rotary_pos_emb is rotate
    assert replaced.count("LlamaRMSNorm") == 5
    assert replaced.count("LlamaMLP") == 2


@pytest.mark.parametrize("batch", [1, 3])
def test_a_whole_model_gives_the_same_logits_and_gradients(batch):
    torch.manual_seed(0)
    model = modeling_llama.LlamaForCausalLM(CONFIG).double().requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    ids = torch.randint(0, 50, (batch, 9), generator=torch.Generator().manual_seed(1))
    weight = model.model.layers[0].self_attn.q_proj.weight
    found = []
    for inside in (False, True):
        if inside:
            with fused(model):
                logits = model(input_ids=ids).logits
                gradient = torch.autograd.grad(logits.pow(2).sum(), weight)[0]
        else:
            logits = model(input_ids=ids).logits
            gradient = torch.autograd.grad(logits.pow(2).sum(), weight)[0]
        found.append((logits.detach(), gradient))
    # transformers' norm rounds to float32 in between
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
