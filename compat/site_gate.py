"""Hook: a hospital's gate stands between its SuperNode and the connection to the SuperLink.

Flower gives its SuperNode a connection of eight functions (``_init_connection``), and everything
that passes between a hospital and the coordinator passes through them (heartbeats aside, which
carry a node id). ``supernode/gate`` says what becomes of it.

The gate leans on how Flower uses the connection, so the functions that use it are pinned as well.
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
    },
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
