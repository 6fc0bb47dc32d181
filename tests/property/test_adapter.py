"""The flat adapter: what is packed is what is unpacked, and a wrong layout is named."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from app.adapter.layout import Manifest, digest, pack, unpack
from app.errors import AppError

states = st.dictionaries(
    st.text("abcdefgh.lora_AB01", min_size=1, max_size=20),
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=0, max_dims=3, max_side=5),
        elements=st.floats(width=32, allow_nan=True),
    ),
    max_size=8,
)


@given(states)
def test_unpack_is_the_inverse_of_pack(state):
    manifest = Manifest.of(state)
    again = unpack(pack(state), manifest)
    assert list(again) == sorted(state)
    for name in state:
        assert again[name].tobytes() == state[name].tobytes()
        assert again[name].shape == state[name].shape


@given(states)
def test_a_manifest_survives_its_json(state):
    manifest = Manifest.of(state)
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert Manifest.from_json(manifest.to_json()).digest == manifest.digest


@given(states)
def test_the_order_of_insertion_does_not_matter(state):
    backwards = dict(reversed(state.items()))
    assert Manifest.of(state) == Manifest.of(backwards)
    assert digest(pack(state)) == digest(pack(backwards))


@given(states.filter(bool), st.integers(1, 9))
def test_an_array_of_another_length_is_refused(state, extra):
    flat = np.concatenate([pack(state), np.zeros(extra, np.float32)])
    with pytest.raises(AppError, match="expected float32 of shape"):
        unpack(flat, Manifest.of(state))


def test_the_first_tensor_that_differs_is_named():
    ours = Manifest((("a", (2, 3)), ("b", (4,)), ("c", (1,))))
    with pytest.raises(AppError, match=r"differs at b: expected \(4,\), found \(5,\)"):
        ours.check(Manifest((("a", (2, 3)), ("b", (5,)), ("c", (2,)))))
    with pytest.raises(AppError, match=r"differs at b: expected \(4,\), found no such tensor"):
        ours.check(Manifest((("a", (2, 3)), ("c", (1,)))))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dtype":"float64","tensors":[]}'])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(AppError, match="adapter manifest"):
        Manifest.from_json(text)


@given(states.filter(bool), st.lists(st.integers(1, 999), min_size=1, max_size=4))
def test_averaging_flat_equals_averaging_tensor_by_tensor(state, weights):
    """Flower's own FedAvg cannot tell the flat array from the tensors in it."""
    rng = np.random.default_rng(0)
    replies = [
        {name: rng.normal(size=value.shape).astype(np.float32) for name, value in state.items()}
        for _ in weights
    ]

    def average(records):
        from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

        contents = [
            RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": weight})})
            for arrays, weight in zip(records, weights, strict=True)
        ]
        return aggregate_arrayrecords(contents, FedAvg().weighted_by_key)

    flat = average([ArrayRecord({"adapter": Array(pack(reply))}) for reply in replies])
    whole = average([ArrayRecord({n: Array(v) for n, v in r.items()}) for r in replies])
    expected = pack({name: array.numpy() for name, array in whole.items()})
    assert flat["adapter"].numpy().tobytes() == expected.tobytes()
