"""A real federation on 127.0.0.1 with a very small app: TLS, node keys, SQLite, no training.

``python -m tests.e2e.warm_federation --help`` measures; ``test_warm_clientapp.py`` tests with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from flwr.cli.build import build_fab_from_disk

from certs import store
from superlink.control import Control
from supernode.command import WARM_BIN
from supernode.warm import supervisor

ROOT = Path(__file__).resolve().parents[2]

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "small"
version = "1.0.0"
description = "small"
license = { file = "LICENSE" }
dependencies = []
[tool.flwr.app]
publisher = "tests"
fab-include = ["app/**/*.py", "LICENSE"]
[tool.flwr.app.components]
serverapp = "app.server_app:app"
clientapp = "app.client_app:app"
[tool.flwr.app.config]
rounds = 3
sample = 2
values = 460000
wait = "adaptive"
what = "reply"
seconds = 0.0
timeout = 120.0
target = ""
out = ""
"""

SERVER = """
import json, random, time
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from app import polling

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    while len(nodes := list(grid.get_nodes())) < int(config["sample"]):
        time.sleep(0.5)
    draw = random.Random(1)
    rounds = []
    array = Array(np.zeros(int(config["values"]), dtype=np.float32))
    for number in range(int(config["rounds"])):
        chosen = draw.sample(sorted(nodes, key=lambda n: n.name), int(config["sample"]))
        ask = ConfigRecord({k: config[k] for k in ("what", "seconds", "target")})
        content = lambda: RecordDict({"arrays": ArrayRecord({"flat": array}), "ask": ask})
        began = time.time()
        messages = [
            Message(content(), dst_node_id=n.node_id, message_type="train", group_id=str(number))
            for n in chosen
        ]
        timeout = float(config["timeout"])
        replies = []
        if config["wait"] == "stock":
            for reply in grid.send_and_receive(messages, timeout=timeout):
                replies.append((time.time(), reply))
        else:
            for reply in polling.replies(grid, messages, timeout):
                replies.append((time.time(), reply))
        ended = time.time()
        row = {"began": began, "ended": ended, "replies": []}
        for arrived, reply in replies:
            told = {"arrived": arrived, "error": reply.error.reason if reply.has_error() else ""}
            if not reply.has_error():
                told.update(json.loads(reply.content["told"]["json"]))
            row["replies"].append(told)
        rounds.append(row)
        Path(config["out"]).write_text(json.dumps(rounds))
"""

CLIENT = """
import ctypes, json, os, random, signal, sys, time
from pathlib import Path
import psutil
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from app import marker

app = ClientApp()
BETWEEN_MESSAGES = []

@app.train()
def train(message, context):
    entered = time.time()
    ask = message.content["ask"]
    target = str(ask["target"])
    if ask["what"] != "reply" and target in ("", context.node_config["name"]):
        if ask["what"] == "exit":
            os._exit(7)
        if ask["what"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if ask["what"] == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if ask["what"] == "segfault":
            ctypes.string_at(0)
    time.sleep(float(ask["seconds"]))
    BETWEEN_MESSAGES.append(message.metadata.message_id)
    random_number = random.random()
    told = {
        "name": context.node_config["name"], "pid": os.getpid(), "marker": marker.MARKER,
        "file": marker.__file__, "seen": len(BETWEEN_MESSAGES), "random": random_number,
        "torch": "torch" in sys.modules, "cwd": os.getcwd(), "path": sys.path,
        "started": psutil.Process().create_time(), "entered": entered, "left": time.time(),
    }
    content = RecordDict({"arrays": message.content["arrays"],
                          "told": ConfigRecord({"json": json.dumps(told)})})
    return Message(content, reply_to=message)
"""


def write_app(
    folder: Path, marker: str = "from the FAB", server: str = SERVER, client: str = CLIENT
) -> Path:
    """Write the small app; its module is called ``app``, like this repository's."""
    package = folder / "app"
    package.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "LICENSE").write_text("Apache-2.0\n")
    (package / "__init__.py").write_text("")
    (package / "server_app.py").write_text(server)
    (package / "client_app.py").write_text(client)
    (package / "marker.py").write_text(f"MARKER = {marker!r}\n")
    shutil.copy(ROOT / "app" / "server" / "polling.py", package / "polling.py")
    return folder


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Federation:
    """A SuperLink and its SuperNodes as processes.

    Args:
        home: an empty folder.
        nodes: how many SuperNodes.
        stock: as Flower does everything by itself.
        warm: the warm process's socket for the SuperNodes, or None.
        environment: further variables for the SuperNodes.
    """

    def __init__(
        self,
        home: Path,
        nodes: int,
        *,
        stock: bool = False,
        warm: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.home, self.stock, self.warm = home, stock, warm
        self.names = [f"supernode-{number:02d}" for number in range(nodes)]
        self.port = free_port()
        self.environment = environment or {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.came_online = 0.0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def control(self) -> Control:
        return Control(self.address, self.home / "certs" / "ca.crt")

    def __enter__(self) -> Federation:
        certificates = self.home / "certs"
        store.issue(certificates, self.names, ["127.0.0.1"])
        try:
            self.start_superlink()
            began = time.monotonic()
            with self.control() as control:
                control.register({n: certificates / "supernodes" / f"{n}.pub" for n in self.names})
                for number, name in enumerate(self.names):
                    self.start_supernode(number, name)
                control.wait_online(self.names, 240)
            self.came_online = time.monotonic() - began
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _environment(self, flower_home: Path) -> dict[str, str]:
        flower_home.mkdir(parents=True, exist_ok=True)
        return {
            **{k: v for k, v in os.environ.items() if not k.startswith("MEDFED_WARM")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(flower_home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment, cwd=self.home, stdout=log, stderr=log
            )

    def end(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to one of the processes and wait until it has ended."""
        self.processes[name].send_signal(how)
        self.processes[name].wait(60)

    def start_superlink(self) -> None:
        certificates = self.home / "certs"
        arguments = [
            *("--ssl-certfile", str(certificates / "superlink.crt")),
            *("--ssl-keyfile", str(certificates / "superlink.key")),
            *("--ssl-ca-certfile", str(certificates / "ca.crt")),
            *("--database", str(self.home / "state.db")),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]
        self._start(
            "superlink",
            _program("compat.superlink", "run_superlink", "flower-superlink", self.stock)
            + arguments,
            self._environment(self.home / "flwr-superlink"),
        )
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError((self.home / "superlink.log").read_text())

    def start_supernode(self, number: int, name: str) -> None:
        certificates = self.home / "certs"
        environment = self._environment(self.home / "flwr" / name) | self.environment
        if self.warm is not None:
            environment["MEDFED_WARM_SOCKET"] = str(self.warm)
            environment["MEDFED_WARM_PYTHON"] = sys.executable
            environment["PATH"] = f"{WARM_BIN}:{environment['PATH']}"
        arguments = [
            *("--superlink", self.address),
            *("--root-certificates", str(certificates / "ca.crt")),
            *("--auth-supernode-private-key", str(certificates / "supernodes" / f"{name}.key")),
            *("--node-config", f'partition-id={number} name="{name}"'),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        ]
        self._start(
            name,
            _program("compat.supernode", "run_supernode", "flower-supernode", self.stock)
            + arguments,
            environment,
        )

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()

    def run(self, app: Path, timeout: float = 300.0, **config: Any) -> list[dict[str, Any]]:
        """Run the small app; what its ServerApp saw, round by round."""
        out = self.home / f"out-{time.monotonic_ns()}.json"
        with self.control() as control:
            run_id = control.start_run(build_fab_from_disk(app), {"out": str(out), **config})
            end = time.monotonic() + timeout
            while not (run := control.run(run_id)).finished and time.monotonic() < end:
                time.sleep(0.5)
            if run.status != "completed":
                text = "".join(control.logs(run_id)) if run.finished else "not finished"
                raise AssertionError(f"the run is {run.status}: {run.details}\n{text}")
        return json.loads(out.read_text())


def _program(module: str, function: str, stock_name: str, stock: bool) -> list[str]:
    if stock:
        return [str(Path(sys.executable).parent / stock_name)]
    code = f"import sys; sys.argv[0] = {stock_name!r}; import {module} as m; m.{function}()"
    return [sys.executable, "-c", code]


@contextmanager
def warm_process(home: Path, *arguments: str) -> Iterator[Path]:
    """A supervised warm process; yields its socket once it answers."""
    path = home / "warm" / "socket"
    with (home / "warm.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "supernode.warm", "serve", "--socket", str(path), *arguments],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        if not supervisor.wait_until_ready(path, 180):
            raise TimeoutError((home / "warm.log").read_text())
        yield path
    finally:
        process.terminate()
        process.wait(30)


def cpu_and_memory(federation: Federation, seconds: float) -> dict[str, float]:
    """CPU of two cores at rest (0 to 1) and PSS in MB, by kind of process."""
    tree: dict[str, list[psutil.Process]] = {"superlink": [], "supernodes": []}
    for name, process in federation.processes.items():
        top = psutil.Process(process.pid)
        kind = "superlink" if name == "superlink" else "supernodes"
        tree[kind] += [top, *top.children(recursive=True)]
    before = {kind: sum(sum(p.cpu_times()[:2]) for p in ps) for kind, ps in tree.items()}
    time.sleep(seconds)
    result: dict[str, float] = {}
    for kind, processes in tree.items():
        used = sum(sum(p.cpu_times()[:2]) for p in processes) - before[kind]
        result[f"{kind}_cpu_of_2_cores"] = round(used / seconds / 2, 4)
        result[f"{kind}_processes"] = len(processes)
        pss = sum(p.memory_full_info().pss for p in processes)
        result[f"{kind}_pss_mb"] = round(pss / 1e6)
    return result


def hops(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds of the slowest node's seconds on each leg."""
    there = [max(r["entered"] - x["began"] for r in x["replies"]) for x in rounds]
    start = [max(r["started"] - x["began"] for r in x["replies"]) for x in rounds]
    inside = [max(r["left"] - r["entered"] for r in x["replies"]) for x in rounds]
    back = [max(r["arrived"] - r["left"] for r in x["replies"]) for x in rounds]
    whole = [x["ended"] - x["began"] for x in rounds]
    over = [w - i for w, i in zip(whole, inside, strict=True)]
    legs = {
        "process": start,
        "there": there,
        "inside": inside,
        "back": back,
        "round": whole,
        "overhead": over,
    }
    return {leg: round(statistics.median(values), 3) for leg, values in legs.items()}


def main() -> None:
    """Measure one configuration."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--rest", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        app = write_app(home / "small")

        def measure(warm: Path | None) -> None:
            with Federation(home, options.nodes, stock=options.stock, warm=warm) as federation:
                time.sleep(5)
                rest = cpu_and_memory(federation, options.rest)
                rounds = federation.run(
                    app,
                    timeout=900,
                    rounds=options.rounds,
                    seconds=options.seconds,
                    wait="stock" if options.stock else "adaptive",
                )
                print(json.dumps({"online_s": round(federation.came_online, 1), **rest}))
                print(json.dumps(hops(rounds[1:])))
                if any(r["error"] for x in rounds for r in x["replies"]):
                    print([r["error"] for x in rounds for r in x["replies"]])

        if options.warm:
            with warm_process(home) as path:
                measure(path)
                print((home / "warm.log").read_text()[-300:])
        else:
            measure(None)


if __name__ == "__main__":
    main()
