"""What of a reply may leave. Each thing that may not is a failing twin of one reply that may."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given, settings
from hypothesis import strategies as st

from supernode.gate.policy import ReplyLimits
from supernode.gate.reply import Checked, RefusedError, check

SIZE = 50
LIMITS = ReplyLimits(
    parameters=SIZE,
    dtype="float32",
    max_norm=10.0,
    max_bytes=2000,
    metrics=("num-examples", "train-loss"),
)
SECRET = "Patient 4711 has"


def adapter(**changes: object) -> np.ndarray:
    values = np.linspace(-1, 1, SIZE, dtype=np.float32)
    for index, value in changes.items():
        values[int(index[1:])] = value
    return values


def arrays(**named: np.ndarray) -> ArrayRecord:
    return ArrayRecord({name: Array(values) for name, values in named.items()})


def train(**changes: object) -> RecordDict:
    records = {
        "arrays": arrays(adapter=adapter()),
        "metrics": MetricRecord({"num-examples": 12, "train-loss": 0.5}),
        **changes,
    }
    return RecordDict({name: record for name, record in records.items() if record is not None})


def objects(content: RecordDict) -> tuple[str, dict[str, bytes]]:
    """A reply's objects as Flower's ClientApp pushes them, and the id of its message."""
    found = {key: one.deflate() for key, one in get_all_nested_objects(content).items()}
    return with_root(found, [content.object_id])


def with_root(found: dict[str, bytes], children: list[str]) -> tuple[str, dict[str, bytes]]:
    message = f"Message {','.join(children)} 0".encode() + b"\0"
    root = hashlib.sha256(message).hexdigest()
    return root, {**found, root: message}


def checked(content: RecordDict, message_type: str = "train", limits=LIMITS) -> Checked:
    root, found = objects(content)
    return check(limits, message_type, root, found)


def refusal(content: RecordDict, message_type: str = "train") -> str:
    with pytest.raises(RefusedError) as caught:
        checked(content, message_type)
    assert SECRET not in caught.value.reason
    assert len(caught.value.reason) < 200
    assert len(caught.value.detail) <= 300
    return caught.value.reason


def test_what_the_policy_allows_leaves_unchanged():
    found = checked(train())
    assert found.content == train()
    assert found.norm == pytest.approx(np.linalg.norm(adapter()))
    assert found.metrics == {"num-examples": 12, "train-loss": 0.5}


def test_a_metric_may_be_missing():
    assert checked(train(metrics=MetricRecord({}))).metrics == {}


def test_the_identity_of_a_simulated_node_leaves():
    content = RecordDict({"identity": ConfigRecord({"partition-id": 7})})
    assert checked(content, "query").content == content


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_agreed_type_leaves_bit_by_bit(dtype):
    limits = ReplyLimits(SIZE, dtype, 10.0, 2000, LIMITS.metrics)
    values = adapter().astype(dtype)
    content = train(arrays=arrays(adapter=values))
    array = checked(content, limits=limits).content["arrays"]["adapter"]
    assert array.numpy().dtype == values.dtype
    assert array.numpy().tobytes() == values.tobytes()
    assert content == checked(content, limits=limits).content


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arrays": arrays(adapter=adapter(), more=adapter())}, "found 1 others"),
        ({"arrays": arrays(other=adapter())}, "found 1 others and 1 missing"),
        ({"arrays": None}, "1 missing"),
        ({"metrics": None}, "1 missing"),
        ({"rows": arrays(adapter=adapter())}, "found 1 others"),
        ({SECRET: ConfigRecord({"row": SECRET})}, "found 1 others"),
        ({"metrics": ConfigRecord({"train-loss": SECRET})}, "kind MetricRecord, found Config"),
        ({"arrays": MetricRecord({"a": 1})}, "kind ArrayRecord, found MetricRecord"),
        ({"metrics": MetricRecord({SECRET: 1.0})}, "found 1 others"),
        ({"metrics": MetricRecord({"train-loss": [1.0, 2.0]})}, "one number as train-loss"),
        ({"metrics": MetricRecord({"train-loss": [ord(c) for c in SECRET]})}, "found a list"),
        ({"metrics": MetricRecord({"train-loss": float("nan")})}, "a finite number as train-loss"),
        ({"metrics": MetricRecord({"train-loss": float("inf")})}, "a finite number as train-loss"),
        ({"arrays": arrays(adapter=adapter(_3=np.nan))}, "finite numbers in the adapter"),
        ({"arrays": arrays(adapter=adapter(_3=np.inf))}, "finite numbers in the adapter"),
        ({"arrays": arrays(adapter=adapter(_3=11))}, "of norm 10 at most"),
        ({"arrays": arrays(adapter=adapter(_3=3e38))}, "of norm 10 at most"),
        ({"arrays": arrays(adapter=adapter()[:-1])}, "of 50 numbers in one row, found 49"),
        ({"arrays": arrays(adapter=adapter().reshape(5, 10))}, "found 2 dimensions"),
        ({"arrays": arrays(adapter=np.zeros(60, np.float32))}, "found 60 numbers"),
        ({"arrays": arrays(adapter=np.zeros(4000, np.float32))}, "at most 2000 bytes"),
        ({"arrays": arrays(adapter=adapter().astype(np.float64))}, "float32, found float64"),
        ({"arrays": arrays(adapter=adapter().view(np.int32))}, "float32, found another type"),
        ({"arrays": arrays(adapter=np.array([SECRET]))}, "float32, found another type"),
    ],
)
def test_nothing_else_leaves(changes, reason):
    assert reason in refusal(train(**changes))


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({"identity": ConfigRecord({"partition-id": SECRET})}),
        RecordDict({"identity": ConfigRecord({"partition-id": -1})}),
        RecordDict({"identity": ConfigRecord({"partition-id": True})}),
        RecordDict({"identity": ConfigRecord({"partition-id": [1]})}),
        RecordDict({"identity": ConfigRecord({"partition-id": 1, "name": SECRET})}),
        RecordDict({"identity": MetricRecord({"partition-id": 1})}),
        train(),
    ],
)
def test_an_identity_is_one_number(content):
    refusal(content, "query")


@pytest.mark.parametrize("message_type", ["evaluate", "train.other", SECRET, ""])
def test_no_other_message_has_an_answer(message_type):
    assert refusal(train(), message_type) == "expected a message of type train or query"


# --- what only a ClientApp that writes its own objects can send -----------------------------------


def array(body: dict, chunks: list[bytes]) -> RecordDict:
    """A reply whose array is said to be ``body``, of such chunks."""
    return forged(json.dumps(body).encode(), chunks)


def forged(body: bytes, chunks: list[bytes]) -> tuple[str, dict[str, bytes]]:
    found: dict[str, bytes] = {}

    def put(kind: str, children: list[str], content: bytes) -> str:
        one = f"{kind} {','.join(children)} {len(content)}".encode() + b"\0" + content
        key = hashlib.sha256(one).hexdigest()
        found[key] = one
        return key

    ids = [put("ArrayChunk", [], chunk) for chunk in chunks]
    one = put("Array", list(dict.fromkeys(ids)), body)
    record = put("ArrayRecord", [one], json.dumps({"adapter": one}).encode())
    metrics = MetricRecord({"num-examples": 12})
    found[metrics.object_id] = metrics.deflate()
    names = {"arrays": record, "metrics": metrics.object_id}
    content = put("RecordDict", list(names.values()), json.dumps(names).encode())
    return with_root(found, [content])


DATA = Array(adapter()).data
BODY = {"dtype": "float32", "shape": [SIZE], "stype": "numpy.ndarray", "arraychunk_ids": [0]}


def test_what_is_forged_as_flower_would_write_it_passes():
    root, found = forged(json.dumps(BODY).encode(), [DATA])
    assert check(LIMITS, "train", root, found).content["arrays"] == train()["arrays"]


def test_what_is_hidden_around_the_numbers_stays_behind():
    """Names, spaces and fields that Flower does not read: the gate builds its own."""
    body = json.dumps({**BODY, "row": SECRET}).encode() + b" " * 10
    root, found = forged(body, [DATA])
    content = check(LIMITS, "train", root, found).content
    leaves = b"".join(one.deflate() for one in get_all_nested_objects(content).values())
    assert SECRET.encode() not in leaves
    assert content["arrays"] == train()["arrays"]


@pytest.mark.parametrize(
    ("body", "chunks", "reason"),
    [
        (BODY, [DATA + SECRET.encode()], "bytes of adapter"),
        (BODY, [DATA.replace(b"'descr'", b"'decoy'")], "NumPy's own format"),
        (BODY, [b"PK\x03\x04" + DATA[4:]], "NumPy's own format"),
        ({**BODY, "arraychunk_ids": [0] * 300}, [DATA], "bytes of adapter"),
        ({**BODY, "arraychunk_ids": [1]}, [DATA], "cannot be read"),
        ({**BODY, "arraychunk_ids": "0"}, [DATA], "cannot be read"),
        ({**BODY, "stype": SECRET}, [DATA], "in one row"),
        ({**BODY, "shape": [10**400]}, [DATA], "another shape"),
        ({**BODY, "shape": [-(10**400)]}, [DATA], "another shape"),
        ({**BODY, "shape": SECRET}, [DATA], "dimensions"),
        ({**BODY, "dtype": SECRET}, [DATA], "another type"),
        ({**BODY, "dtype": [SECRET]}, [DATA], "cannot be read"),
        ({}, [DATA], "cannot be read"),
        ([SECRET], [DATA], "cannot be read"),
    ],
)
def test_a_forged_array_is_refused(body, chunks, reason):
    root, found = forged(json.dumps(body).encode(), chunks)
    with pytest.raises(RefusedError) as caught:
        check(LIMITS, "train", root, found)
    assert reason in caught.value.reason
    assert SECRET not in caught.value.reason
    assert len(caught.value.reason) < 200


def test_objects_that_belong_to_nothing_are_refused():
    root, found = objects(train())
    found["00" * 32] = f"ArrayChunk  {len(SECRET)}\0{SECRET}".encode()
    with pytest.raises(RefusedError, match="found 1 more objects"):
        check(LIMITS, "train", root, found)


def test_a_missing_object_is_refused():
    root, found = objects(train())
    for key in found:
        with pytest.raises(RefusedError):
            check(LIMITS, "train", root, {k: v for k, v in found.items() if k != key})


NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats())
RECORDS = st.one_of(
    st.dictionaries(
        st.one_of(st.sampled_from(LIMITS.metrics), st.text()),
        st.one_of(NUMBERS, st.lists(st.integers(-(2**63), 2**63 - 1))),
    ).map(MetricRecord),
    st.dictionaries(
        st.one_of(st.just("partition-id"), st.text()),
        st.one_of(NUMBERS, st.booleans(), st.text(), st.binary()),
    ).map(ConfigRecord),
    st.dictionaries(
        st.one_of(st.just("adapter"), st.text(alphabet="abc", min_size=1)),
        st.tuples(st.sampled_from(["float32", "float64", "int64"]), st.sampled_from([0, 1, SIZE])),
        max_size=2,
    ).map(lambda named: arrays(**{k: np.ones(size, dtype) for k, (dtype, size) in named.items()})),
)
CONTENTS = st.dictionaries(
    st.one_of(st.sampled_from(["arrays", "metrics", "identity"]), st.text()), RECORDS, max_size=3
).map(RecordDict)


def is_allowed(content: RecordDict, message_type: str) -> bool:
    """The policy in other words, on what Flower itself reads back."""
    if message_type == "query":
        partition = dict(content["identity"])["partition-id"]
        return list(content) == ["identity"] and type(partition) is int and partition >= 0
    values = content["arrays"]["adapter"].numpy()
    return (
        set(content) == {"arrays", "metrics"}
        and list(content["arrays"]) == ["adapter"]
        and values.dtype == np.float32
        and values.shape == (SIZE,)
        and bool(np.isfinite(values).all())
        and float(np.linalg.norm(values)) <= 10
        and set(content["metrics"]) <= set(LIMITS.metrics)
        and all(
            type(value) in {int, float} and np.isfinite(float(value))
            for value in content["metrics"].values()
        )
    )


@settings(deadline=None, max_examples=300)
@given(CONTENTS, st.sampled_from(["train", "query", "evaluate"]))
def test_whatever_is_answered_only_what_is_allowed_passes(content, message_type):
    try:
        found = checked(content, message_type)
    except RefusedError:
        return
    assert found.content == content
    assert is_allowed(found.content, message_type)


@settings(deadline=None, max_examples=500)
@given(st.data())
def test_whatever_bytes_arrive_nothing_crashes_and_only_what_is_allowed_passes(data):
    root, found = objects(train())
    keys = sorted(found)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(keys))
        content = bytearray(found[key])
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(start + 8, len(content))))
        content[start:end] = data.draw(st.binary(max_size=8))
        found[key] = bytes(content)
    try:
        passed = check(LIMITS, "train", root, found)
    except RefusedError as refused:
        assert len(refused.reason) < 200
        return
    assert is_allowed(passed.content, "train")


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(st.text(max_size=3), st.binary(max_size=60), max_size=5), st.text(max_size=3)
)
def test_objects_of_any_kind_are_refused(found, root):
    with pytest.raises(RefusedError):
        check(LIMITS, "train", root, found)
