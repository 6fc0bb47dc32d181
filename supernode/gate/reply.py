"""What of a reply may leave: everything the app sent is taken apart, and a new reply is built.

Nothing that an app wrote is ever passed on as it is. The values that the policy allows are read
out of the reply's objects, checked, and put into records of the gate's own, so there is no place
in names, headers, padding or unknown fields where a record could travel along.

An answer to ``train`` is one array record ``arrays`` with the one array ``adapter``, and one metric
record ``metrics``. An answer to ``query`` is one config record ``identity`` with the whole number
``partition-id``. Nothing else has an answer.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, MetricRecord, RecordDict

from .policy import DTYPES, ReplyLimits

ARRAYS, ADAPTER, METRICS = "arrays", "adapter", "metrics"
IDENTITY, PARTITION = "identity", "partition-id"
_STYPE = "numpy.ndarray"
_KINDS = {
    "Message",
    "RecordDict",
    "ArrayRecord",
    "MetricRecord",
    "ConfigRecord",
    "Array",
    "ArrayChunk",
}
_DETAIL_CHARACTERS = 300


class RefusedError(Exception):
    """A reply, or a FAB, may not pass.

    Args:
        reason: for the coordinator: numbers and the policy's words only, none of the app's.
        detail: for the hospital's own log: what the app wrote, cut short.
    """

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = str(detail)[:_DETAIL_CHARACTERS]


@dataclass(frozen=True)
class Checked:
    """A reply that may leave.

    Args:
        content: built by the gate.
        norm: the adapter's L2 norm; None if there is no adapter.
        metrics: the numbers that leave with it.
    """

    content: RecordDict
    norm: float | None
    metrics: dict[str, int | float]


def check(
    limits: ReplyLimits, message_type: str, root: str, objects: Mapping[str, bytes]
) -> Checked:
    """Read a reply out of its objects.

    Args:
        limits: the policy's.
        message_type: of the message that is answered.
        root: id of the reply's message object.
        objects: id → content of all its objects, as the app sent them.

    Raises:
        RefusedError: it is not exactly what the policy allows.
    """
    try:
        return _check(limits, message_type, _Objects(objects), root)
    except RefusedError:
        raise
    except Exception as error:  # noqa: BLE001  (whatever an app can make it stumble over)
        raise RefusedError("the reply cannot be read", repr(error)) from None


def _check(limits: ReplyLimits, message_type: str, objects: _Objects, root: str) -> Checked:
    if objects.bytes > limits.max_bytes:
        raise RefusedError(f"expected at most {limits.max_bytes} bytes, found {objects.bytes}")
    (content,) = objects.children(root, "Message", 1)
    if message_type == MessageType.TRAIN:
        records = objects.names(content, "RecordDict", {ARRAYS, METRICS})
        arrays = objects.names(records[ARRAYS], "ArrayRecord", {ADAPTER})
        adapter = _array(limits, objects, arrays[ADAPTER])
        norm = _norm(limits, adapter)
        metrics = _metrics(limits, objects, records[METRICS])
        objects.all_used()
        rebuilt = RecordDict(
            {ARRAYS: ArrayRecord({ADAPTER: Array(adapter)}), METRICS: MetricRecord(dict(metrics))}
        )
        return Checked(rebuilt, norm, metrics)
    if message_type == MessageType.QUERY:
        records = objects.names(content, "RecordDict", {IDENTITY})
        partition = _partition(objects, records[IDENTITY])
        objects.all_used()
        identity = ConfigRecord({PARTITION: partition})
        return Checked(RecordDict({IDENTITY: identity}), None, {PARTITION: partition})
    raise RefusedError("expected a message of type train or query", message_type)


class _Objects:
    """The objects of one reply, each of which must be used."""

    def __init__(self, contents: Mapping[str, bytes]) -> None:
        self._contents = contents
        self._used: set[str] = set()
        self.bytes = sum(len(content) for content in contents.values())

    def body(self, key: str, kind: str) -> tuple[bytes, list[str]]:
        """A part's body and its children's ids."""
        content = self._contents.get(key)
        if content is None:
            raise RefusedError("expected a whole reply, found that a part is missing", key)
        self._used.add(key)
        # Flower's form: kind, ids of the children and length of the body; a zero byte; the body.
        head, _, body = content.partition(b"\0")
        found, children, _ = head.decode().split(" ")
        if found != kind:
            known = found if found in _KINDS else "something else"
            raise RefusedError(f"expected a part of kind {kind}, found {known}", found)
        return body, children.split(",") if children else []

    def whole(self, key: str, kind: str) -> bytes:
        """A part as it arrived, for Flower to read."""
        self.body(key, kind)
        return self._contents[key]

    def children(self, key: str, kind: str, count: int) -> list[str]:
        """The ids of a part's children, of which there must be so many."""
        _, children = self.body(key, kind)
        if len(children) != count:
            raise RefusedError(f"expected a {kind} with {count} part, found {len(children)}")
        return children

    def names(self, key: str, kind: str, expected: set[str]) -> dict[str, str]:
        """Name → id of the parts of a record, which must have exactly these names."""
        body, _ = self.body(key, kind)
        found = json.loads(body)
        if not isinstance(found, dict) or set(found) != expected:
            names = list(found) if isinstance(found, dict) else []
            raise RefusedError(
                f"expected {' and '.join(sorted(expected))} and nothing else, found "
                f"{len(set(names) - expected)} others and {len(expected - set(names))} missing",
                names,
            )
        return found

    def all_used(self) -> None:
        """Nothing may be left over."""
        left = len(self._contents) - len(self._used)
        if left:
            raise RefusedError(f"expected nothing but the reply's parts, found {left} more objects")


def _array(limits: ReplyLimits, objects: _Objects, key: str) -> np.ndarray[Any, Any]:
    """The adapter, shape ``(parameters,)``."""
    body, children = objects.body(key, "Array")
    about = json.loads(body)
    if about["dtype"] != limits.dtype:
        known = about["dtype"] if about["dtype"] in DTYPES else "another type"
        raise RefusedError(
            f"expected an adapter of {limits.dtype}, found {known}", repr(about["dtype"])
        )
    if about["shape"] != [limits.parameters] or about["stype"] != _STYPE:
        raise RefusedError(
            f"expected an adapter of {limits.parameters} numbers in one row, "
            f"found {_size(about['shape'])}",
            about,
        )
    indices = about["arraychunk_ids"]
    # Equal chunks travel once and may be named often: lengths are added up before bytes are.
    chunks = {index: objects.body(children[index], "ArrayChunk")[0] for index in set(indices)}
    header = _npy_header(limits)
    expected = len(header) + limits.parameters * DTYPES[limits.dtype]
    if sum(len(chunks[index]) for index in indices) != expected:
        raise RefusedError(f"expected {expected} bytes of adapter, found another number of them")
    data = b"".join(chunks[index] for index in indices)
    if not data.startswith(header):
        raise RefusedError("expected the adapter in NumPy's own format, found something else")
    return np.frombuffer(data, np.dtype(limits.dtype).newbyteorder("<"), offset=len(header)).astype(
        limits.dtype, copy=False
    )


def _size(shape: list[Any]) -> str:
    """An array's shape for the coordinator: no number with room for more than a number."""
    if len(shape) != 1:
        return f"{len(shape)} dimensions"
    return (
        f"{shape[0]} numbers"
        if type(shape[0]) is int and 0 <= shape[0] < 10**12
        else "another shape"
    )


def _npy_header(limits: ReplyLimits) -> bytes:
    """How ``numpy.save`` begins the file of such an array, to the last space."""
    stream = io.BytesIO()
    about = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(limits.dtype).newbyteorder("<")),
        "fortran_order": False,
        "shape": (limits.parameters,),
    }
    np.lib.format.write_array_header_1_0(stream, about)
    return stream.getvalue()


def _norm(limits: ReplyLimits, adapter: np.ndarray[Any, Any]) -> float:
    if not np.isfinite(adapter).all():
        raise RefusedError("expected finite numbers in the adapter, found others")
    norm = float(np.linalg.norm(adapter.astype(np.float64)))
    if norm > limits.max_norm:
        raise RefusedError(f"expected an adapter of norm {limits.max_norm:g} at most, found more")
    return norm


def _metrics(limits: ReplyLimits, objects: _Objects, key: str) -> dict[str, int | float]:
    found = MetricRecord.inflate(objects.whole(key, "MetricRecord"))
    strangers = sorted(set(found) - set(limits.metrics))
    if strangers:
        raise RefusedError(
            f"expected only metrics that the policy names, found {len(strangers)} others", strangers
        )
    metrics: dict[str, int | float] = {}
    for name in limits.metrics:
        value = found.get(name)
        if value is None:
            continue
        if type(value) not in {int, float}:
            raise RefusedError(f"expected one number as {name}, found a list", value)
        metrics[name] = value  # type: ignore[assignment]
        if not math.isfinite(metrics[name]):
            raise RefusedError(f"expected a finite number as {name}, found {value}")
    return metrics


def _partition(objects: _Objects, key: str) -> int:
    found = dict(ConfigRecord.inflate(objects.whole(key, "ConfigRecord")))
    value = found.get(PARTITION)
    if set(found) != {PARTITION} or type(value) is not int or value < 0:
        raise RefusedError(f"expected the whole number {PARTITION} and nothing else", found)
    return value
