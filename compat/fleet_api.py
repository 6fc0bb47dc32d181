"""The SuperLink's Fleet API: Flower's client of it, its messages and its signatures."""

from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

__all__ = [
    "HEARTBEAT_DEFAULT_INTERVAL",
    "ActivateNodeRequest",
    "ApiErrorCode",
    "DeactivateNodeRequest",
    "FleetHttpClient",
    "FlowerError",
    "Node",
    "NodeAuthHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "SendNodeHeartbeatRequest",
    "public_key_to_bytes",
]
