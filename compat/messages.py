"""Flower's private names around messages: error codes, and a message's objects."""

from flwr.common.constant import ErrorCode
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import push_objects
from flwr.supercore.run import RunNotRunningException

AGENT_APP = TaskType.AGENT_APP

__all__ = [
    "AGENT_APP",
    "ErrorCode",
    "RunNotRunningException",
    "get_all_nested_objects",
    "get_object_tree",
    "iterate_object_tree",
    "no_object_id_recompute",
    "push_objects",
]
