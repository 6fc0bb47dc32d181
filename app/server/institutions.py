"""Who is in the federation: an institution is its name, never Flower's random node id."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from app.errors import AppError
from app.seeds import derive
from app.server import polling

ROSTER_VARIABLE = "MEDFED_INSTITUTIONS"
_QUERY_TIMEOUT_S = 60.0


def name_of(partition_id: int) -> str:
    """The name of the institution that holds a partition where none was registered."""
    return f"supernode-{partition_id:02d}"


@dataclass(frozen=True)
class Presence:
    """An institution that is online, as the SuperLink sees its SuperNode.

    Attributes:
        node_id: Flower's.
        online_until: seconds since the epoch; every heartbeat moves it.
        activated: when it last connected, as the SuperLink wrote it down.
    """

    node_id: int
    online_until: float
    activated: str


class Institutions:
    """The institutions online now, by name, and the order in which a round asks them.

    A deployment gives names: each SuperNode was registered under one. A simulation gives none:
    there each node is asked once for its partition, so that the same institution trains in the
    same round of either.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._names: dict[int, str] = {}
        self.registered = False  # under names, as in a deployment
        roster = os.environ.get(ROSTER_VARIABLE, "")
        self.expected: tuple[str, ...] = tuple(sorted(n for n in roster.split(",") if n))

    def online(self) -> dict[str, Presence]:
        """Every institution that is online, by name."""
        nodes = list(self._grid.get_nodes())
        unnamed = []
        for node in nodes:
            if node.node_id in self._names:
                continue
            if node.name:
                self._names[node.node_id] = node.name
                self.registered = True
            else:
                unnamed.append(node.node_id)
        if unnamed:
            self._names.update(self._ask_for_partitions(unnamed))
        by_name = {
            self._names[node.node_id]: Presence(
                node.node_id, node.online_until, node.last_activated_at
            )
            for node in nodes
            if node.node_id in self._names
        }
        return dict(sorted(by_name.items()))

    def known(self) -> tuple[str, ...]:
        """Everyone who should be there: the roster where the coordinator has one, else who was."""
        if not (self.expected or self._names):
            self.online()
        return self.expected or tuple(sorted(set(self._names.values())))

    def order(self, seed: int, server_round: int) -> list[str]:
        """All known institutions in the order in which round ``server_round`` asks them."""
        names = sorted(self.known())
        random.Random(derive(seed, "sampling", server_round)).shuffle(names)  # noqa: S311 - repeatable
        return names

    def wait_for(
        self,
        needed: Callable[[int], int],
        deadline_s: float,
        on_wait: Callable[[int, int], None],
    ) -> dict[str, Presence]:
        """Wait until a round can be staffed.

        Args:
            needed: number of known institutions → how many a round needs.
            deadline_s: seconds until waiting is given up.
            on_wait: told (online, needed) whenever the number online changes.

        Raises:
            AppError: saying how many are missing and, where there is a roster, which.
        """
        end = time.monotonic() + deadline_s
        seen = -1
        while True:
            online = self.online()
            count = needed(len(self.expected or online))
            if len(online) >= count:
                return online
            if len(online) != seen:
                seen = len(online)
                on_wait(seen, count)
            if time.monotonic() > end:
                missing = [name for name in self.expected if name not in online]
                names = f"; not online: {', '.join(missing)}" if missing else ""
                raise AppError(
                    f"a round needs {count} institutions, {len(online)} are online, "
                    f"{count - len(online)} missing{names}",
                    "start the missing SuperNodes (medfed status shows each), "
                    "or lower strategy.min-train-nodes",
                )
            time.sleep(1.0)

    def _ask_for_partitions(self, node_ids: list[int]) -> dict[int, str]:
        questions = [
            Message(content=RecordDict(), dst_node_id=node_id, message_type=MessageType.QUERY)
            for node_id in node_ids
        ]
        replies = polling.replies(self._grid, questions, _QUERY_TIMEOUT_S)
        return {
            reply.metadata.src_node_id: name_of(int(str(reply.content["identity"]["partition-id"])))
            for reply in replies
            if not reply.has_error()
        }
