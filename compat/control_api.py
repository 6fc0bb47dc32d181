"""The SuperLink's Control API: Flower's client of it and its messages."""

from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.proto.federation_config_pb2 import SimulationConfig
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

__all__ = [
    "HEARTBEAT_PATIENCE",
    "CliClientHttpInterceptor",
    "ControlHttpClient",
    "Fab",
    "FlowerError",
    "ListNodesRequest",
    "ListRunsRequest",
    "NodeInfo",
    "RegisterNodeRequest",
    "RuntimeVersionHttpInterceptor",
    "SimulationConfig",
    "StartRunRequest",
    "StopRunRequest",
    "StreamLogsRequest",
    "UnregisterNodeRequest",
    "fab_to_proto",
    "user_config_to_proto",
]
