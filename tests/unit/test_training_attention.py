"""Packed attention against transformers' own, sequence by sequence, in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward as eager

from app.errors import AppError
from app.training.attention import (
    PACKED_ATTENTION,
    PackedSequences,
    SharedPrefix,
    _packed_attention,
    causal_mask,
    packed_attention,
)

HEADS, KEY_VALUE_HEADS, DIM = 4, 2, 8
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
# transformers' eager attention rounds its softmax to float32, whatever it is given.
THEIRS = pytest.mark.parametrize(
    ("theirs", "tolerance"),
    [
        pytest.param(sdpa_attention_forward, TIGHT, id="sdpa"),
        pytest.param(eager, {"rtol": 0, "atol": 5e-6}, id="eager"),
    ],
)
# Shorter than a block of the masked kernel, as long, longer; and of one token.
LENGTHS = (1, 63, 64, 65, 200)


@pytest.fixture
def layer():
    """What an attention function sees of a layer of transformers."""
    module = torch.nn.Module()
    module.layer_idx = 3
    module.num_key_value_groups = HEADS // KEY_VALUE_HEADS
    module.is_causal = True
    return module


@pytest.fixture(params=[0, 5], ids=["no prefix", "a prefix"])
def states(request):
    """Queries, keys and values of packed sequences; keys and values of their prefix."""
    generator = torch.Generator().manual_seed(request.param)

    def double(heads, tokens):
        values = torch.randn(1, heads, tokens, DIM, dtype=torch.float64, generator=generator)
        return values.requires_grad_()

    tokens, prefix = sum(LENGTHS), request.param
    return SimpleNamespace(
        query=double(HEADS, tokens),
        own=(double(KEY_VALUE_HEADS, tokens), double(KEY_VALUE_HEADS, tokens)),
        prefix=(double(KEY_VALUE_HEADS, prefix), double(KEY_VALUE_HEADS, prefix)),
        prefix_length=prefix,
    )


def packed(layer, states, **choices):
    sequences = PackedSequences(LENGTHS, {layer: states.prefix}, **choices)
    found, _ = _packed_attention(
        layer, states.query, *states.own, None, scaling=DIM**-0.5, sequences=sequences
    )
    return found


def mask_for(states):
    return causal_mask(max(LENGTHS), states.prefix_length, torch.float64, torch.device("cpu"))


def one_by_one(attention, layer, states):
    """Each sequence alone behind the prefix, by an attention function of transformers."""
    found, start = [], 0
    prefix = states.prefix_length
    for length in LENGTHS:
        keys, values = (
            torch.cat([first, own[:, :, start : start + length]], dim=2)
            for first, own in zip(states.prefix, states.own, strict=True)
        )
        rows = states.query[:, :, start : start + length]
        queries = torch.cat([rows.new_zeros(1, HEADS, prefix, DIM), rows], dim=2)
        total = prefix + length
        mask = torch.full((1, 1, total, total), float("-inf"), dtype=torch.float64).triu(1)
        whole, _ = attention(layer, queries, keys, values, mask, scaling=DIM**-0.5, dropout=0.0)
        found.append(whole[:, prefix:])
        start += length
    return torch.cat(found, dim=1)


def gradients(found, states):
    """Of a sum in which every value has a weight of its own."""
    weights = torch.randn(
        found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1)
    )
    inputs = (states.query, *states.own, *states.prefix)
    return torch.autograd.grad((found * weights).sum(), inputs)


@THEIRS
def test_training_attends_as_transformers_does_with_the_same_gradients(
    layer, states, theirs, tolerance
):
    expected, found = one_by_one(theirs, layer, states), packed(layer, states)
    torch.testing.assert_close(found, expected, **tolerance)
    for one, other in zip(gradients(found, states), gradients(expected, states), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@THEIRS
def test_evaluation_attends_as_transformers_does(layer, states, theirs, tolerance):
    with torch.inference_mode():
        found = packed(layer, states, mask=mask_for(states))
        expected = one_by_one(theirs, layer, states)
    torch.testing.assert_close(found, expected, **tolerance)


def test_last_rows_alone_are_those_of_the_whole_and_the_others_are_zero(layer, states):
    with torch.inference_mode():
        whole = packed(layer, states, mask=mask_for(states))
        found = packed(layer, states, mask=mask_for(states), last_rows_layer=3)
        of_another_layer = packed(layer, states, mask=mask_for(states), last_rows_layer=2)
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    torch.testing.assert_close(found[:, last], whole[:, last], **TIGHT)
    assert found.count_nonzero() == found[:, last].count_nonzero()
    assert torch.equal(of_another_layer, whole)


def test_a_layer_records_the_keys_and_values_that_it_computed(layer, states):
    record = {}
    packed(layer, states, record=record)
    assert record == {layer: states.own}


def network():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("masked", [False, True], ids=["causal kernel", "in blocks"])
def test_a_shared_prefix_holds_the_keys_and_values_of_a_cache(masked):
    model, ids = network(), torch.arange(7)[None]
    mask = causal_mask(7, 0, torch.float32, torch.device("cpu")) if masked else None
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with packed_attention(model):
            prefix = SharedPrefix(model, ids, mask)
    assert (prefix.length, len(prefix.keys_and_values)) == (7, 2)
    for layer, (keys, values) in prefix.keys_and_values.items():
        torch.testing.assert_close(keys, cache.layers[layer.layer_idx].keys)
        torch.testing.assert_close(values, cache.layers[layer.layer_idx].values)


def test_a_prefix_of_no_tokens_costs_no_pass(monkeypatch):
    model = network()
    monkeypatch.setattr(model.model, "forward", lambda **_: pytest.fail("a pass"))
    prefix = SharedPrefix(model, torch.zeros(1, 0, dtype=torch.int64))
    assert (prefix.length, prefix.keys_and_values) == (0, {})


def test_the_network_s_own_attention_comes_back_even_after_an_error():
    model = network()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), packed_attention(model):
        assert model.config._attn_implementation == PACKED_ATTENTION
        raise ZeroDivisionError
    assert model.config._attn_implementation == before != PACKED_ATTENTION


def test_the_attention_window_counts_the_prefix_too():
    layer = torch.nn.Module()
    query, key, value = torch.zeros(3, 1, 2, 4, 8)
    sequences = PackedSequences((4,), {layer: (key[:, :, :3], value[:, :, :3])})
    _packed_attention(layer, query, key, value, None, sliding_window=7, sequences=sequences)
    with pytest.raises(AppError, match="window of 6 tokens, found one of 7"):
        _packed_attention(layer, query, key, value, None, sliding_window=6, sequences=sequences)


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
def test_attention_that_is_more_than_a_softmax_is_refused(layer, states, option):
    sequences = PackedSequences(LENGTHS, {})
    with pytest.raises(AppError, match=f"expected plain softmax attention, found {option}"):
        _packed_attention(
            layer, states.query, *states.own, None, sequences=sequences, **{option: 30.0}
        )
