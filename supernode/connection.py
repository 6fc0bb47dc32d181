"""The SuperNode's connection to the SuperLink, as a file that others can look at.

Flower does not say whether a SuperNode is connected. But each of its requests to the SuperLink is
signed with the SuperNode's key and refused if the key is not registered, and httpx, which Flower
uses, logs every answer. So every answer that is a success is evidence of an authenticated
connection, and gives the file a new modification time. ``supernode.health`` looks at how old that
is. Polls come every few seconds; while a ClientApp works, heartbeats come at least every 25 s.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from common import files

from .command import Settings

FILE_NAME = "connection.json"


def file() -> Path:
    """Where this SuperNode (this FLWR_HOME) keeps the evidence."""
    return Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / FILE_NAME


class _Evidence(logging.Handler):
    """Touch the file whenever httpx logs a success from the SuperLink's Fleet API."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        # httpx logs: method, URL, HTTP version, status, reason.
        if not isinstance(record.args, tuple) or len(record.args) != 5:
            return
        _, url, _, status, _ = record.args
        if status == 200 and "/v1/fleet/" in str(url):
            os.utime(self._path)


def record(settings: Settings, node_id: int) -> None:
    """Write the file and keep it fresh for as long as requests to the SuperLink succeed."""
    path = file()
    content = {
        "name": settings.name,
        "node-id": node_id,
        "superlink": settings.superlink,
        "ca": str(settings.ca.resolve()),
        "runtime-port": settings.runtime_port,
        "pid": os.getpid(),
    }
    files.write(path, json.dumps(content).encode())
    logger = logging.getLogger("httpx")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(_Evidence(path))


def last_node_id() -> int | None:
    """The node id of the session that was here before; None if there was none."""
    try:
        return int(json.loads(file().read_text(encoding="utf-8"))["node-id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
