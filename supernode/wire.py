"""What really crosses the wire: bytes of this SuperNode's TLS connections, by the kernel's count.

The leaderboard counts the adapters' arrays. A hospital's network sees more: messages around them,
HTTP, TLS, heartbeats, questions. ``wire.jsonl`` has a line for each reply that left, with the bytes
both ways since the line before, of everything in the TCP streams (not their packets' headers).

Linux alone counts this (``TCP_INFO``, tcp(7)); elsewhere no line is written. No library does:
psutil counts a machine's network, not a process's.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

# struct tcp_info of linux/tcp.h: two 64-bit counters after 8 bytes and 24 words of 4, and two more.
_COUNTERS = struct.Struct("=120xQQ")


@dataclass(frozen=True)
class Traffic:
    """Bytes of TCP payload.

    Args:
        sent: acknowledged by the other end.
        received: from the other end.
    """

    sent: int
    received: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent + other.sent, self.received + other.received)

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(self.sent - other.sent, self.received - other.received)


def traffic(connection: socket.socket) -> Traffic | None:
    """What has crossed one TCP connection so far; None where the kernel does not say."""
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        acknowledged, received = _COUNTERS.unpack_from(info)
    except (AttributeError, OSError, struct.error):
        return None
    # The kernel counts the opening handshake as one byte.
    return Traffic(max(0, acknowledged - 1), received)


class Meter:
    """Counts every TLS connection of this process, open or closed."""

    def __init__(self) -> None:
        self._open: weakref.WeakSet[ssl.SSLSocket] = weakref.WeakSet()
        self._closed = Traffic(0, 0)
        self._lock = threading.Lock()

    def install(self) -> None:
        """Count the connections that are opened from now on.

        ``ssl.SSLContext.sslsocket_class`` is documented to be overridden for such ends.
        """
        meter = self

        class Metered(ssl.SSLSocket):
            def do_handshake(self, block: bool = False) -> None:
                with meter._lock:
                    meter._open.add(self)
                super().do_handshake(block)

            def close(self) -> None:
                meter._ends(self)
                super().close()

        ssl.SSLContext.sslsocket_class = Metered

    def _ends(self, connection: ssl.SSLSocket) -> None:
        with self._lock:
            if connection in self._open:
                self._open.discard(connection)
                self._closed += traffic(connection) or Traffic(0, 0)

    def total(self) -> Traffic:
        """Everything so far."""
        with self._lock:
            found = self._closed
            for connection in list(self._open):
                found += traffic(connection) or Traffic(0, 0)
            return found


class WireLog:
    """Appends to ``wire.jsonl`` what crossed the wire since its last line.

    Args:
        file: the log.
        meter: what counts.
    """

    def __init__(self, file: Path, meter: Meter) -> None:
        self._file, self._meter = file, meter
        self._before = Traffic(0, 0)

    def reply_left(self, run_id: int) -> None:
        """Note that a reply of run ``run_id`` has reached the SuperLink."""
        now = self._meter.total()
        crossed, self._before = now - self._before, now
        line = {"time": round(time.time(), 3), "run_id": str(run_id)}
        with self._file.open("a", encoding="utf-8") as log:
            log.write(json.dumps({**line, "sent": crossed.sent, "received": crossed.received}))
            log.write("\n")


def wire_log() -> WireLog:
    """Count this process's connections from now on, in the log beside its Flower state."""
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    meter = Meter()
    meter.install()
    return WireLog(home / "wire.jsonl", meter)
