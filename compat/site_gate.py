"""Hook: a hospital's gate stands between its SuperNode and the connection to the SuperLink.

Flower gives its SuperNode a connection of eight functions (``_init_connection``), and everything
that passes between a hospital and the coordinator passes through them (heartbeats aside, which
carry a node id). ``supernode/gate`` says what becomes of it.

The gate leans on how Flower uses the connection, on what a message consists of and on where apps
are installed, so those functions are pinned as well.
Where one of them differs the SuperNode does not start: unlike slower polling, an open gate is
nothing to fall back to.

Replaced: ``_init_connection``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from flwr.app import Message

from .digests import replace
from .hooks import Hook

_WORKER = "flwr.supernode.start_client_internal"


def _names_of_the_gate() -> list[str]:
    """Fails to be imported where Flower lacks a name that the gate uses."""
    from . import fab, messages

    del fab, messages
    return []


HOOK = Hook(
    name="site_gate",
    gives="a hospital's own policy decides what runs on its data and what leaves",
    without="a SuperNode with a gate does not start",
    pins={
        _WORKER: {
            "start_client_internal": "9e89a6eb68fbec68",
            "_pull_and_store_message": "eaf5d0e36dc34e4c",
            "_push_messages": "00bb86faffdec114",
            "_init_connection": "800f9aba73646ea2",
        },
        "flwr.supercore.inflatable.inflatable_object": {
            "get_all_nested_objects": "409d9822fd87e1eb",
            "get_object_tree": "d247ce6d76fd2e69",
            "iterate_object_tree": "34c0fe845619356a",
            "no_object_id_recompute": "1374cc3f64f13fe8",
        },
        "flwr.supercore.inflatable.inflatable_utils": {"push_objects": "5893dafc584a46c8"},
        "flwr.cli.config_utils": {"get_fab_metadata": "630a9325eb4aae47"},
        "flwr.common.config": {"get_project_dir": "155c70517e73e598"},
    },
    check=_names_of_the_gate,
)


class Connection(NamedTuple):
    """What Flower's ``_init_connection`` yields."""

    node_id: int
    receive: Callable[[], tuple[Message, Any] | None]
    send: Callable[[Message, Any, float], tuple[set[str], str]]
    get_run: Callable[[int], Any]
    get_fab: Callable[[str, int], Any]
    pull_object: Callable[[int, str], bytes]
    push_object: Callable[[int, str, str, bytes], None]
    confirm_message_received: Callable[[int, str], None]


def install(guard: Callable[[Connection], Connection]) -> None:
    """Put ``guard`` between the SuperNode that this process is about to start and its SuperLink."""
    connect = import_module(_WORKER)._init_connection

    @contextmanager
    def connect_through_gate(**arguments: Any) -> Iterator[Connection]:
        with connect(**arguments) as connection:
            yield guard(Connection(*connection))

    replace(_WORKER, "_init_connection", connect_through_gate)
