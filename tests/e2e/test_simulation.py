"""The same app on 20 SuperNodes and in Flower's simulation, by the user's own two commands."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from medfed import processes
from medfed.communication import wire_of
from medfed.paths import Home
from supernode import roster
from tests.small_llama import CONFIG as SMALL
from tests.small_llama import small_home

pytestmark = [pytest.mark.processes, pytest.mark.weights]

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
LOCAL_SUPERLINK_PORT = 39093  # where the flwr command starts a SuperLink for simulations
PORT = 30500
CONFIG = {**SMALL, "num-server-rounds": 2, "evaluate.holdout-examples": 8}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return small_home(tmp_path_factory.mktemp("medfed"))


@pytest.fixture(scope="module")
def environment(home: Home) -> Iterator[dict[str, str]]:
    """A federation of 20 that is up, and a Flower home of its own that knows it."""
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", LOCAL_SUPERLINK_PORT)) == 0
    assert not taken, f"another simulation SuperLink runs on port {LOCAL_SUPERLINK_PORT}: end it"
    variables = {
        **os.environ,
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "MEDFED_HOME": str(home.root),
        "FLWR_HOME": str(home.root / "flwr"),
    }
    processes.up(home, roster.load(), port=PORT, deadline_s=240)
    try:
        medfed = [PROGRAMS / "medfed", "connect"]
        subprocess.run(medfed, env=variables, check=True, capture_output=True)
        yield variables
    finally:
        processes.down(home)
        _end_local_superlink(variables["FLWR_HOME"])


def _end_local_superlink(flwr_home: str) -> None:
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "flower-superlink" in command and flwr_home in command:
            family = [process, *process.children(recursive=True)]
            for one in family:
                one.kill()
            psutil.wait_procs(family, timeout=20)


def run(connection: str, environment: dict[str, str], **overrides: object) -> tuple[str, Path]:
    """``flwr run . CONNECTION --stream``; its output and the run's folder."""
    settings = {**CONFIG, **overrides}
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    done = subprocess.run(
        [PROGRAMS / "flwr", "run", str(ROOT), connection, "--stream", "-c", config],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    output = done.stdout + done.stderr
    found = re.search(r"Successfully started run (\d+)", output)
    assert found, output
    return output, Path(environment["MEDFED_HOME"]) / "runs" / found[1]


def summary(folder: Path) -> dict[str, object]:
    end = time.monotonic() + 60
    while not (folder / "summary.json").exists():
        assert time.monotonic() < end, f"no summary in {folder}: {list(folder.glob('*'))}"
        time.sleep(0.2)
    return dict(json.loads((folder / "summary.json").read_text()))


def test_both_commands_complete_and_give_the_same_adapter(environment):
    _, deployed = run("local-deployment", environment)
    _, simulated = run("local-simulation", environment)
    assert summary(deployed)["adapter_sha256"] == summary(simulated)["adapter_sha256"]
    # In whatever order replies came: they are summed in the order of names.
    events = [
        sorted(
            (event["round"], event["event"], event.get("institution"), event["train_loss"])
            for event in map(json.loads, (folder / "events.jsonl").read_text().splitlines())
            if event["event"] in ("reply", "round-finished")
        )
        for folder in (deployed, simulated)
    ]
    assert events[0] == events[1]
    assert (deployed / "peft_2" / "adapter_model.safetensors").is_file()
    # Two adapters each way in two rounds, and HTTP, TLS and signatures around them.
    home = Home(Path(environment["MEDFED_HOME"]))
    wire = wire_of(home, deployed.name)
    assert wire is not None
    assert wire["bytes"] > int(str(summary(deployed)["bytes"]))
    assert set(wire["supernodes"]) == {one["institution"] for one in replies(deployed)}
    assert wire_of(home, simulated.name) is None


def replies(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "reply"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.name": "local/no-such-model"}, "expected a model in .*no-such-model"),
        ({"model.quantization": 5}, "model.quantization: expected 4 or 8 .* found 5"),
        ({"static.dataset.name": "local/none"}, "expected the dataset local/none"),
        (
            {"strategy.min-train-nodes": 21, "strategy.wait-for-nodes-s": 1.0},
            "a round needs 21 institutions, 20 are online, 1 missing",
        ),
    ],
)
def test_a_run_that_cannot_go_on_says_why_on_one_line(environment, overrides, said):
    output, folder = run("local-deployment", environment, **overrides)
    assert re.search(said, output), output
    assert "Traceback" not in output
    assert not list(folder.glob("peft_*"))


def test_a_supernode_that_is_not_online_is_named(environment, home):
    federation = processes.load(home)
    assert federation is not None
    absent = federation.supernodes[7]
    process = absent.find()
    assert process is not None
    for one in (*process.children(recursive=True), process):
        one.terminate()
    needed = {"strategy.min-train-nodes": 20, "strategy.wait-for-nodes-s": 2.0}
    output, _ = run("local-deployment", environment, **needed)
    assert "not online: supernode-07" in output, output
