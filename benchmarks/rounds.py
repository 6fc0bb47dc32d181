"""What a round costs besides its training: stock Flower, medfed deployed, medfed simulated.

    python -m benchmarks.rounds [--rounds 6] [--steps 4] [--batch 8] [--json]

All three run in one go on the same machine, model, cards and steps: 20 SuperNodes, two a round,
TLS, node authentication and a SQLite database where there is a SuperLink. The stock side is
Flower as it comes with an app in the shape of the leaderboard's template (``benchmarks/stock``).
Progress goes to stderr; ``--json`` prints the result, ``--save`` keeps it under ``results/``.
``--against PYTHON`` measures the deployment of another environment in the same run, for example
that of another Flower.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import certs
from compat.fab import build_fab_from_disk
from medfed import processes
from medfed.paths import Home
from medfed.runs import PROJECT
from medfed.simulation import simulation as simulating
from superlink import command as superlink_command
from superlink.control import Control
from supernode import command as supernode_command
from supernode import roster

RESULTS = Path(__file__).parent / "results"
PROGRAMS = Path(sys.executable).parent
SETTLE_S = 15.0
REST_S = 20.0
SIDES = ("stock", "deployment", "simulation")
GATEWAY = 50  # the gateway's port, counted from its side's first


@dataclass(frozen=True)
class Measured:
    """One of the three, medians over its steady rounds (the first is left out).

    Attributes:
        round_s: seconds of a round.
        training_s: seconds that the slowest client trained.
        overhead_s: the difference.
        requests: to the SuperLink in a round; None where there is no SuperLink to ask.
        bytes: through the SuperLink in a round, as it counts them itself; None likewise.
        idle_cpu: share of all cores, at rest.
        rest_pss: bytes of memory of all processes at rest, shared pages divided.
        online_s: seconds from nothing to 20 nodes online.
        rounds: every round's (seconds, training).
    """

    round_s: float
    training_s: float
    overhead_s: float
    requests: float | None
    bytes: float | None
    idle_cpu: float | None
    rest_pss: int | None
    online_s: float | None
    rounds: list[tuple[float, float]]


def measured(rounds: Sequence[tuple[float, float]], **rest: Any) -> Measured:
    """Medians of steady rounds; ``rest`` are the fields that are measured elsewhere."""
    steady = list(rounds[1:])
    fields = {"requests": None, "bytes": None, "idle_cpu": None, "rest_pss": None, "online_s": None}
    return Measured(
        round_s=statistics.median(seconds for seconds, _ in steady),
        training_s=statistics.median(training for _, training in steady),
        overhead_s=statistics.median(seconds - training for seconds, training in steady),
        rounds=list(rounds),
        **{**fields, **rest},
    )


def say(line: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


class Bench:
    """A home of its own for one measurement, with the prepared model and cards linked in."""

    def __init__(self, root: Path, prepared: Home, options: argparse.Namespace) -> None:
        self.home = Home(root)
        root.mkdir(parents=True)
        for folder in (prepared.models, prepared.datasets, prepared.partitions):
            (root / folder.name).symlink_to(folder)
        self.config: dict[str, bool | float | int | str] = {
            "model.name": options.model,
            "model.quantization": options.quantization,
            "model.gradient-checkpointing": False,
            "static.dataset.name": options.dataset,
            "train.training-arguments.max-steps": options.steps,
            "train.training-arguments.per-device-train-batch-size": options.batch,
            "train.save-every-round": options.rounds,
            "evaluate.holdout-examples": 0,
            "num-server-rounds": options.rounds,
        }

    def run(self, control: Control, fab: bytes, simulate: int | None = None) -> int:
        """Start a run and wait until it is over; its id."""
        run_id = control.start_run(fab, self.config, simulate=simulate)
        while not (run := control.run(run_id)).finished:
            time.sleep(2)
        if run.status != "completed":
            raise SystemExit(f"error: the run is {run.status}: {run.details}")
        return run_id

    def rounds(self, run_id: int) -> list[tuple[float, float]]:
        """Seconds and slowest training of each round, from medfed's own record."""
        training: dict[int, float] = {}
        found = []
        for line in (self.home.runs / str(run_id) / "events.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "reply":
                number = event["round"]
                training[number] = max(training.get(number, 0.0), event["train_seconds"])
            elif event["event"] == "round-finished":
                found.append((event["seconds"], training[event["round"]]))
        return found


def at_rest(trees: Callable[[], list[psutil.Process]]) -> dict[str, float]:
    """CPU (share of all cores) and memory of process trees that have nothing to do."""
    say(f"at rest: settling {SETTLE_S:.0f} s, then watching {REST_S:.0f} s")
    time.sleep(SETTLE_S)
    before = {process.pid: _cpu_seconds(process) for process in trees()}
    time.sleep(REST_S)
    spent = sum(_cpu_seconds(p) - before[p.pid] for p in trees() if p.pid in before)
    memory = sum(p.memory_full_info().pss for p in trees())
    return {"idle_cpu": spent / REST_S / (os.cpu_count() or 1), "rest_pss": memory}


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _trees(roots: Sequence[int]) -> list[psutil.Process]:
    found = []
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            found += [root, *root.children(recursive=True)]
    return found


def _requests(log: Path) -> int:
    """Requests that a SuperLink's access log has seen, but for ours (the Control API)."""
    text = log.read_text(errors="replace")
    return len(re.findall(r'"(?:POST|GET) /v1/(?:fleet|runtime)/', text))


def _traffic(control: Control, run_id: int) -> int:
    run = control.run(run_id)
    return run.bytes_sent + run.bytes_received


def stock(bench: Bench, port: int) -> Measured:
    """Flower as it comes, with an app in the shape of the template."""
    home, names = bench.home, roster.load().names
    certs.issue(home.certs, names)
    rounds_log = home.root / "rounds.jsonl"
    with _started() as start:
        began = time.monotonic()
        settings = superlink_command.Settings(
            certificate=home.certs / "superlink.crt",
            key=home.certs / "superlink.key",
            ca=home.certs / "ca.crt",
            database=home.root / "state.db",
            port=port,
        )
        environment = superlink_command.environment(settings, os.environ, PROGRAMS)
        environment |= {
            "MEDFED_HOME": str(home.root),
            "MEDFED_BENCHMARK_LOG": str(rounds_log),
            "FLWR_HOME": str(home.root / "flwr"),
        }
        log = home.root / "superlink.log"
        start(superlink_command.arguments(settings), environment, log)
        with _reachable(f"127.0.0.1:{port}", home) as control:
            control.register({n: home.certs / "supernodes" / f"{n}.pub" for n in names})
            for number, entry in enumerate(roster.load().supernodes):
                node = supernode_command.Settings(
                    entry=entry,
                    partition=entry.partition,
                    num_partitions=len(names),
                    superlink=f"127.0.0.1:{port}",
                    ca=home.certs / "ca.crt",
                    key=home.certs / "supernodes" / f"{entry.name}.key",
                    public_keys=home.certs / "supernodes",
                    data=home.partitions / entry.name,
                    runtime_port=port + 1 + number,
                )
                environment = supernode_command.environment(node, os.environ, PROGRAMS)
                environment |= {
                    "MEDFED_HOME": str(home.root),
                    "FLWR_HOME": str(home.root / "supernodes" / entry.name),
                }
                node_log = home.root / f"{entry.name}.log"
                start(supernode_command.arguments(node), environment, node_log)
            control.wait_online(names, 600)
            online_s = time.monotonic() - began
            say(f"stock: 20 SuperNodes online after {online_s:.1f} s")
            rest = at_rest(lambda: _trees([child.pid for child in start.children]))
            before = _requests(log)
            say(f"stock: {bench.config['num-server-rounds']} rounds (about a minute each)")
            run_id = bench.run(control, _stock_fab(home.root / "stock-app"))
            total = len(rounds := _stock_rounds(rounds_log))
            return measured(
                rounds,
                requests=(_requests(log) - before) / total,
                bytes=_traffic(control, run_id) / total,
                online_s=online_s,
                **rest,
            )


def _stock_fab(folder: Path) -> bytes:
    """The stock app, bundled with the parts of medfed's app that it borrows."""
    shutil.copytree(PROJECT / "app", folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(__file__).parent / "stock", folder / "stock")
    shutil.copy(PROJECT / "LICENSE", folder)
    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    project = project.replace('"app/**/*.py"', '"app/**/*.py", "stock/**/*.py"')
    for component in ("server", "client"):
        project = project.replace(f'"app.{component}_app:app"', f'"stock.{component}_app:app"')
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    return build_fab_from_disk(folder)


def _stock_rounds(log: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [(line["seconds"], line["training"]) for line in lines]


def deployment(bench: Bench, port: int) -> Measured:
    """medfed on 20 SuperNodes, as ``medfed up`` starts them, with the gateway in front."""
    home, names = bench.home, roster.load().names
    certs.issue(home.certs, names)
    with gateway(home.certs, home.root / "gateway", port, port + GATEWAY) as fleet:
        return _deployed(bench, port, fleet)


def _deployed(bench: Bench, port: int, fleet: str) -> Measured:
    home = bench.home
    began = time.monotonic()
    up = processes.up(home, roster.load(), port=port, fleet=fleet)
    try:
        online_s = time.monotonic() - began
        say(f"deployment: 20 SuperNodes online after {online_s:.1f} s")
        log = Path(up.federation.superlink.log)
        rest = at_rest(lambda: _trees([process.pid for process in up.federation.processes]))
        before = _requests(log)
        with Control(up.federation.address, home.certs / "ca.crt") as control:
            run_id = bench.run(control, build_fab_from_disk(PROJECT))
            rounds = bench.rounds(run_id)
            return measured(
                rounds,
                requests=(_requests(log) - before) / len(rounds),
                bytes=_traffic(control, run_id) / len(rounds),
                online_s=online_s,
                **rest,
            )
    finally:
        processes.down(home)


def simulation(bench: Bench, _port: int) -> Measured:
    """medfed in Flower's simulation, with one core for each client."""
    with simulating(bench.home) as address, Control(address) as control:
        say("simulation: running")
        nodes = roster.load().num_partitions
        run_id = bench.run(control, build_fab_from_disk(PROJECT), simulate=nodes)
        return measured(bench.rounds(run_id))


@contextlib.contextmanager
def gateway(pki: Path, scratch: Path, superlink: int, port: int) -> Iterator[str]:
    """A gateway's fleet listener on ``port``, in front of a SuperLink's port; its address.

    nginx that root has started works as another user: the way to ``scratch`` must be open to it.
    """
    scratch.mkdir(mode=0o711)
    command = [
        *("-m", "superlink.gateway", "--scratch", str(scratch)),
        *("--superlink", f"127.0.0.1:{superlink}", "--superlink-name", "localhost"),
        *("--certificate", str(pki / "superlink.crt"), "--key", str(pki / "superlink.key")),
        *("--ca", str(pki / "ca.crt"), "--public-keys", str(pki / "supernodes")),
        *("--fleet", f"127.0.0.1:{port}"),
    ]
    with _started() as start:
        start(["python", *command], dict(os.environ), scratch / "log")
        _wait(lambda: _listens(port), 30, f"a gateway on port {port}, see {scratch}/log")
        yield f"localhost:{port}"


class _Children:
    def __init__(self) -> None:
        self.children: list[subprocess.Popen[bytes]] = []

    def __call__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("wb") as output:
            child = subprocess.Popen(
                [PROGRAMS / arguments[0], *arguments[1:]],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.children.append(child)


@contextlib.contextmanager
def _started() -> Iterator[_Children]:
    """Start processes; end them and what they started at the end."""
    started = _Children()
    try:
        yield started
    finally:
        everyone = _trees([child.pid for child in started.children])
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(everyone, timeout=20)
        for process in alive:
            process.kill()


@contextlib.contextmanager
def _reachable(address: str, home: Home) -> Iterator[Control]:
    port = int(address.rpartition(":")[2])
    _wait(lambda: _listens(port), 60, f"a SuperLink at {address}")
    with Control(address, home.certs / "ca.crt") as control:
        yield control


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(done: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise SystemExit(f"error: expected {what} within {seconds:.0f} s, found none")
        time.sleep(0.5)


def preflight(sides: Iterable[str], port: int, other: Path | None = None) -> list[str]:
    """What is missing on this machine, before minutes are spent on it: a line for each.

    Args:
        sides: what is to be measured.
        port: the first side's; each side has 100 of its own.
        other: interpreter of the environment to measure against.
    """
    found = []
    if other and not _has_flower(other):
        found.append(
            f"expected an interpreter with Flower in {other}, found none; hint: make setup-oldest"
        )
    nodes = len(roster.load().names)
    wanted: list[int] = []
    for number, side in enumerate(SIDES):
        first = port + 100 * number
        if side in sides and side != "simulation":  # which takes any free port
            wanted += [*range(first, first + nodes + 1)]
        if side in sides and side == "deployment":
            wanted.append(first + GATEWAY)
            if shutil.which("nginx") is None:
                found.append("expected nginx for the gateway, found none on PATH; "
                             "hint: apt-get install nginx-light")  # fmt: skip
    if taken := [one for one in wanted if _listens(one)]:
        found.append(
            f"expected free ports from {port}, found {', '.join(map(str, taken))} in use; "
            "hint: --port, or end what listens there"
        )
    return found


def _has_flower(python: Path) -> bool:
    look = [str(python), "-c", "from importlib.metadata import version; version('flwr')"]
    try:
        return subprocess.run(look, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def against(python: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The deployment as another environment measures it, with the same settings.

    Args:
        python: its interpreter; SuperLink, SuperNodes and ClientApps are started from there.
        options: of this run.
    """
    command = [str(python), "-m", "benchmarks.rounds", "--only", "deployment", "--json"]
    for name in ("rounds", "steps", "batch", "model", "quantization", "dataset", "port"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise SystemExit(f"error: {python} could not measure its deployment, see above")
    found: dict[str, Any] = json.loads(done.stdout)
    return {"flower": found["flower"], **found["deployment"]}


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for logs and state, which stays where it is if something fails."""
    folder = Path(tempfile.mkdtemp(prefix="medfed-rounds-"))
    folder.chmod(0o711)
    try:
        yield folder
    except BaseException:
        say(f"what has been written stays in {folder}")
        raise
    shutil.rmtree(folder)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = psutil.virtual_memory().total / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
    }


def chart(result: dict[str, Any], path: Path) -> None:
    """Draw where a round's time goes on each of the three sides: training, and all the rest."""
    from matplotlib.figure import Figure

    names = [name for name in ("stock", "deployment", "simulation") if name in result]
    training = [result[name]["training_s"] for name in names]
    rest = [result[name]["overhead_s"] for name in names]
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, training, color="#4c72b0", label="slowest client's training")
    axes.barh(names, rest, left=training, color="#dd8452", label="everything else")
    for row, (busy, idle) in enumerate(zip(training, rest, strict=True)):
        axes.text(busy + idle, row, f" {busy:.1f} + {idle:.1f} s", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("seconds a round (median)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure all three, print, and keep the result where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounds")
    parser.add_argument("--rounds", type=int, default=6, help="the first is not counted")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model", default="local/SmolLM2-135M-Instruct-Q4_1")
    parser.add_argument(
        "--quantization", type=int, choices=(0, 4, 8), default=4, help="bits; 4 is the reference's"
    )
    parser.add_argument("--dataset", default="local/hpo-flashcards")
    parser.add_argument("--port", type=int, default=21000)
    parser.add_argument("--only", choices=SIDES, action="append")
    parser.add_argument(
        "--against", type=Path, help="interpreter of another environment, to measure beside this"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--save", action="store_true", help="keep it under benchmarks/results/")
    parser.add_argument("--chart", type=Path, help="draw where a round's time goes (PNG)")
    options = parser.parse_args()
    if options.against and options.only and "deployment" not in options.only:
        parser.error("--against is for the deployment, which --only leaves out")
    if options.rounds < 2:
        parser.error("expected at least 2 rounds: the first is not counted")
    if problems := preflight(options.only or SIDES, options.port, options.against):
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        return 1
    # Else Flower leaves routine requests out of the access log, which is where they are counted.
    os.environ["FLWR_LOG_LEVEL"] = "DEBUG"
    prepared = Home.from_environment()
    sides = {"stock": stock, "deployment": deployment, "simulation": simulation}
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "flower": metadata.version("flwr"),
        "options": {
            name: getattr(options, name)
            for name in ("rounds", "steps", "batch", "model", "quantization")
        },
    }
    with scratch_folder() as scratch:
        for number, (name, measure) in enumerate(sides.items()):
            if options.only and name not in options.only:
                continue
            say(f"{name}: starting")
            bench = Bench(scratch / name, prepared, options)
            result[name] = asdict(measure(bench, options.port + 100 * number))
            say(
                f"{name}: round {result[name]['round_s']:.2f} s, "
                f"overhead {result[name]['overhead_s']:.2f} s"
            )
    if options.against:
        say(f"against: the deployment of {options.against}")
        result["against"] = against(options.against, options)
        ratio = result["deployment"]["overhead_s"] / max(result["against"]["overhead_s"], 1e-9)
        result["overhead_over_against"] = ratio
    if "stock" in result and "deployment" in result:
        ratio = result["stock"]["overhead_s"] / max(result["deployment"]["overhead_s"], 1e-9)
        result["overhead_ratio"] = ratio
    if "deployment" in result and "simulation" in result:
        ratio = result["deployment"]["round_s"] / result["simulation"]["round_s"]
        result["deployment_over_simulation"] = ratio
    if options.chart:
        chart(result, options.chart)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"rounds-{result['date']}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        say(f"kept {path}")
    if options.json:
        print(json.dumps(result))
    else:
        for name in ("overhead_ratio", "deployment_over_simulation", "overhead_over_against"):
            if name in result:
                print(f"{name}: {result[name]:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
