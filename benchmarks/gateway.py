"""What the gateway costs: the same signed requests straight to the SuperLink, and through nginx.

    python -m benchmarks.gateway [--pairs 9] [--requests 400] [--uploads 60] [--json] [--save]

A real SuperLink and a real gateway on this machine, TLS on every connection, 8 registered nodes in
4 client processes. The SuperLink has one core to itself both times, and clients and gateway share
the others: in a federation the clients are other machines. Requests are heartbeats, answered out of
the SuperLink's database; an upload is a heartbeat that carries 1.8 MB more, an adapter's size.
Straight and through are measured in turn, pair by pair, each first in half of them, for the
machine's speed drifts by more than the gateway costs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import certs
from benchmarks.rounds import RESULTS, gateway, machine, say
from certs.keys import private_from_openssh
from compat.fleet_api import (
    FleetHttpClient,
    Node,
    NodeAuthHttpInterceptor,
    SendNodeHeartbeatRequest,
)
from superlink import health
from superlink.control import Control

NODES = 8
WORKERS = 4
UPLOAD_BYTES = 1_800_000
_DEADLINE_S = 60.0


def _clients(
    address: str, work: Path, nodes: list[tuple[str, int]], count: int, size: int, start: Barrier
) -> None:
    """Once all workers are connected: ``count`` requests as each of ``nodes``."""
    with ExitStack() as stack:
        clients = []
        for name, node_id in nodes:
            content = (work / "supernodes" / f"{name}.key").read_bytes()
            key = private_from_openssh(content, name)
            client = FleetHttpClient.from_server_address(
                address,
                insecure=False,
                root_certificates=(work / "ca.crt").read_bytes(),
                interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
            )
            request = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=30)
            if size:
                request.MergeFromString(_unknown_field(secrets.token_bytes(size)))
            clients.append((stack.enter_context(client), request))
        for client, request in clients:
            client.SendNodeHeartbeat(request)
        start.wait()
        for _ in range(count):
            for client, request in clients:
                if not client.SendNodeHeartbeat(request).success:
                    raise SystemExit("error: expected the SuperLink to know the node, found not")


def _unknown_field(content: bytes) -> bytes:
    """Field 1000 of a protobuf message, which no message of Flower's has: carried, then ignored."""
    header, length = (1000 << 3 | 2), len(content)
    encoded = bytearray()
    for number in (header, length):
        while number > 127:
            encoded.append(number & 127 | 128)
            number >>= 7
        encoded.append(number)
    return bytes(encoded) + content


def measure(address: str, work: Path, nodes: list[tuple[str, int]], count: int, size: int) -> float:
    """Requests a second of all workers together, ``count`` requests in all."""
    each = count // NODES
    shares = [nodes[start::WORKERS] for start in range(WORKERS)]
    context = multiprocessing.get_context("fork")
    start = context.Barrier(WORKERS + 1)
    workers = [
        context.Process(target=_clients, args=(address, work, share, each, size, start))
        for share in shares
    ]
    for worker in workers:
        worker.start()
    start.wait(_DEADLINE_S)
    began = time.monotonic()
    for worker in workers:
        worker.join()
    seconds = time.monotonic() - began
    if any(worker.exitcode for worker in workers):
        raise SystemExit("error: expected every request to be answered, found one that was not")
    return each * NODES / seconds


@contextmanager
def running(work: Path, port: int) -> Iterator[dict[str, str]]:
    """A SuperLink and a gateway in front of it: the addresses of both."""
    pki = work / "certs"
    command = [
        *(sys.executable, "-m", "superlink", "--port", str(port)),
        *("--certificate", str(pki / "superlink.crt"), "--key", str(pki / "superlink.key")),
        *("--ca", str(pki / "ca.crt"), "--database", str(work / "state.db")),
    ]
    environment = {**os.environ, "FLWR_HOME": str(work / "flwr")}
    first, *others = sorted(os.sched_getaffinity(0))
    if not others:
        raise SystemExit("error: expected two cores at least, found one")
    with (work / "log").open("wb") as log:
        os.sched_setaffinity(0, {first})  # what is started inherits it
        superlink = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        os.sched_setaffinity(0, others)
    try:
        end = time.monotonic() + _DEADLINE_S
        while trouble := health.problem("localhost", port, pki / "ca.crt"):
            if time.monotonic() > end:
                raise SystemExit(f"error: {trouble}; {(work / 'log').read_text()[-2000:]}")
            time.sleep(0.5)
        with gateway(pki, work / "gateway", port, port + 1) as through:
            yield {"straight": f"localhost:{port}", "through": through}
    finally:
        superlink.terminate()
        superlink.wait()


def compare(
    ways: dict[str, str],
    work: Path,
    nodes: list[tuple[str, int]],
    pairs: int,
    count: int,
    size: int,
) -> dict[str, Any]:
    """``pairs`` measurements of each way, in turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for name, address in ways.items():
        measure(address, work, nodes, NODES * 2, size)  # not counted: the first is always slow
        say(f"warm: {name}")
    for number in range(pairs):
        order = list(ways) if number % 2 else list(reversed(ways))
        for name in order:
            found[name].append(measure(ways[name], work, nodes, count, size))
        say(" ".join(f"{name} {values[-1]:.1f}/s" for name, values in found.items()))
    shares = [b / a for a, b in zip(found["straight"], found["through"], strict=True)]
    return {
        "bytes": size,
        "requests": count // NODES * NODES,
        "per_second": found,
        "straight": statistics.median(found["straight"]),
        "through": statistics.median(found["through"]),
        "through_over_straight": statistics.median(shares),
    }


def main() -> int:
    """Measure, print, and keep the result where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--requests", type=int, default=400, help="in one measurement")
    parser.add_argument("--uploads", type=int, default=64, help="in one measurement")
    parser.add_argument("--port", type=int, default=25100)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--save", action="store_true", help="keep it under benchmarks/results/")
    options = parser.parse_args()
    names = [f"node-{number}" for number in range(NODES)]
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "nodes": NODES,
        "workers": WORKERS,
    }
    with tempfile.TemporaryDirectory(prefix="medfed-gateway-") as scratch:
        work = Path(scratch)
        work.chmod(0o711)  # nginx started by root works as another user
        certs.issue(work / "certs", names)
        with running(work, options.port) as ways:
            keys = {name: work / "certs" / "supernodes" / f"{name}.pub" for name in names}
            with Control(ways["straight"], work / "certs" / "ca.crt") as control:
                nodes = [(one.name, one.node_id) for one in control.register(keys)]
            for kind, count, size in (
                ("requests", options.requests, 0),
                ("uploads", options.uploads, UPLOAD_BYTES),
            ):
                result[kind] = compare(ways, work / "certs", nodes, options.pairs, count, size)
    if options.save:
        path = RESULTS / f"gateway-{result['date']}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        say(f"kept {path}")
    if options.json:
        print(json.dumps(result))
    else:
        for kind in ("requests", "uploads"):
            found = result[kind]
            print(
                f"{kind}: {found['straight']:.1f}/s straight, {found['through']:.1f}/s through "
                f"the gateway ({found['through_over_straight']:.1%})"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
