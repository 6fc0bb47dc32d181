"""Flower's private names around messages: error codes, and a message's objects."""

from flwr.app import Message
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


def identified(message: Message) -> Message:
    """The same message, with its id in it, as Flower writes one there before it sends a message."""
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


__all__ = [
    "AGENT_APP",
    "ErrorCode",
    "RunNotRunningException",
    "get_all_nested_objects",
    "get_object_tree",
    "identified",
    "iterate_object_tree",
    "no_object_id_recompute",
    "push_objects",
]
