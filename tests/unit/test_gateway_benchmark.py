"""The gateway's benchmark sends what it says."""

from __future__ import annotations

from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node

from benchmarks import gateway


def test_an_upload_is_a_heartbeat_that_carries_so_many_bytes_more() -> None:
    plain = SendNodeHeartbeatRequest(node=Node(node_id=7), heartbeat_interval=30)
    padded = SendNodeHeartbeatRequest.FromString(plain.SerializeToString())
    padded.MergeFromString(gateway._unknown_field(bytes(gateway.UPLOAD_BYTES)))
    sent = padded.SerializeToString(deterministic=True)
    assert 0 <= len(sent) - plain.ByteSize() - gateway.UPLOAD_BYTES < 10
    arrived = SendNodeHeartbeatRequest.FromString(sent)
    assert (arrived.node.node_id, arrived.heartbeat_interval) == (7, 30)
