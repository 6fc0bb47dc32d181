"""The federation in containers, as `docker compose up` makes it, on a real engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from docker.models.containers import Container

from superlink.control import Control
from supernode import roster
from tests.e2e.compose_project import (
    FEDERATION,
    NAMES,
    ONLINE_WITHIN_S,
    ROOT,
    ComposeProject,
    Federation,
    until,
)

pytestmark = pytest.mark.containers

GB = 1e9
TINY_RUN = " ".join(
    f"{key}={value}"
    for key, value in {
        "model.name": '"local/tiny"',
        "model.quantization": 0,
        "static.dataset.name": '"local/hpo-flashcards"',
        "train.seq-length": 64,
        "train.training-arguments.per-device-train-batch-size": 2,
        "train.training-arguments.max-steps": 2,
        "evaluate.holdout-examples": 8,
        "num-server-rounds": 2,
    }.items()
)


@pytest.fixture(scope="session")
def flwr_home(federation: Federation, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user who has run `medfed compose connect`."""
    home = tmp_path_factory.mktemp("user")
    environment = {
        **federation.project.environment,
        "FLWR_HOME": str(home / "flwr"),
        "MEDFED_HOME": str(home / "medfed"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    on_host(["medfed", "compose", "connect"], environment, timeout=60)
    return environment


def on_host(command: list[str], environment: dict[str, str], timeout: float) -> str:
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [program, *command[1:]],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_from_built_images_20_supernodes_are_online_within_120_s(
    federation: Federation, flwr_home: dict[str, str]
) -> None:
    print(f"{len(NAMES)} SuperNodes healthy after {federation.seconds_to_online:.0f} s")
    ca = Path(flwr_home["MEDFED_HOME"]) / "compose" / "ca.crt"
    with Control(f"127.0.0.1:{federation.project.port}", ca) as control:
        assert {node.name for node in control.nodes() if node.online} == set(NAMES)
    assert federation.seconds_to_online < ONLINE_WITHIN_S


def test_at_rest_the_whole_federation_fits_in_8_gb(federation: Federation) -> None:
    def in_use(container: Container) -> int:
        memory = container.stats(stream=False)["memory_stats"]
        cache = memory["stats"].get("total_inactive_file", memory["stats"].get("inactive_file", 0))
        return int(memory["usage"]) - int(cache)

    containers = [container for _, container in federation.project.containers()]
    with ThreadPoolExecutor(len(containers)) as pool:
        total = sum(pool.map(in_use, containers))
    print(f"at rest: {total / GB:.2f} GB in {len(containers)} containers")
    assert total < 8 * GB


def test_no_container_runs_as_root_or_has_a_capability(federation: Federation) -> None:
    status = "print(open('/proc/self/status').read())"
    for service, container in federation.project.containers():
        found = dict(
            line.split(":\t", 1) for line in federation.project.python(service, status).split("\n")
        )
        assert set(found["Uid"].split()) == {"10001"}, service
        assert set(found["Gid"].split()) == {"10001"}, service
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(found[kind], 16) == 0, f"{service}: {kind}"
        assert found["NoNewPrivs"] == "1", service
        assert found["Seccomp"] == "2", service
        host = container.attrs["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert not host["Privileged"], service
        assert host["PidsLimit"] > 0, service
        assert host["Memory"] > 0, service


def test_a_container_writes_neither_its_root_nor_its_site(federation: Federation) -> None:
    attempt = """
import sys
for place in ("/opt/medfed", "/opt/venv", "/site", "/medfed/models", "/etc"):
    try:
        open(place + "/x", "w")
    except OSError as error:
        print(error.errno)
    else:
        sys.exit("wrote " + place)
"""
    refused = federation.project.python(NAMES[7], attempt).split()
    assert len(refused) == 5
    assert federation.project.python(NAMES[7], "open('/tmp/x', 'w'); print('ok')") == "ok"


def test_no_supernode_sees_another_ones_key_or_partition(federation: Federation) -> None:
    walk = """
import json, os
skip = ("/proc", "/sys", "/dev", "/opt/venv", "/usr", "/etc/ssl")
found = []
for folder, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if not os.path.join(folder, f).startswith(skip)]
    found += [os.path.join(folder, f) for f in files if f.endswith((".key", ".pem", ".jsonl"))]
print(json.dumps(sorted(found)))
"""
    for name in NAMES:
        found = json.loads(federation.project.python(name, walk))
        assert found == ["/site/data/train.jsonl", f"/site/{name}.key"]
    digest = "import hashlib; print(hashlib.sha256(open('/site/data/train.jsonl','rb').read()))"
    hashed = digest.replace("()))", "()).hexdigest())")
    assert len({federation.project.python(name, hashed) for name in NAMES}) == len(NAMES)
    superlink = json.loads(federation.project.python("superlink", walk))
    keys = [path for path in superlink if path.endswith(".key")]
    assert keys == ["/medfed/certs/superlink.key"], "not the CA's, and no SuperNode's"


def test_the_images_hold_neither_keys_nor_data_and_share_their_layers(
    built: ComposeProject,
) -> None:
    kinds = ("*.key", "*.pem", "*.jsonl", "*.whl")
    places = "/opt/medfed /medfed /site /certs /public /run /mnt /root /var/tmp /var/lib/nginx"
    wanted = " -o ".join(f"-name '{kind}'" for kind in kinds)
    layers = {}
    for kind in ("superlink", "supernode", "gateway"):
        image = built.client.images.get(f"medfed/{kind}:e2e")
        layers[kind] = image.attrs["RootFS"]["Layers"]
        found = built.client.containers.run(
            image,
            ["-c", f"find $(ls -d {places} 2>/dev/null) {wanted}"],
            entrypoint="sh",
            user="root",
            remove=True,
            network_disabled=True,
        )
        assert found == b""
    pair = layers["superlink"], layers["supernode"]
    shared = [a for a, b in zip(*pair, strict=False) if a == b]
    own = {layer for some in pair for layer in some} - set(shared)
    print(f"{len(shared)} layers shared, {len(own)} of their own")
    assert len(shared) >= 4, "base, packages, user, work folder"


def test_a_demo_run_on_a_tiny_model_ends_with_a_trained_adapter(
    federation: Federation, tmp_path: Path
) -> None:
    done = federation.project.compose(
        *("run", "--rm", "-T", "--no-deps", "demo", "--run-config", TINY_RUN), timeout=300
    )
    found = re.search(r"adapter: (\S+)", done.stdout)
    assert found, done.stdout + done.stderr
    federation.project.compose("cp", f"superlink:{found[1]}", str(tmp_path / "adapter"))
    from safetensors.numpy import load_file

    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    raised = [name for name, array in adapter.items() if "lora_B" in name and array.any()]
    assert raised, "lora_B starts at zero: training has moved it"


def test_flwr_run_local_deployment_works_from_the_host(flwr_home: dict[str, str]) -> None:
    output = on_host(
        ["flwr", "run", ".", "local-deployment", "--stream", "--run-config", TINY_RUN],
        flwr_home,
        timeout=300,
    )
    assert "[ROUND 2] checkpoint" in output


def test_flwr_run_with_another_federations_ca_is_refused(
    flwr_home: dict[str, str], tmp_path: Path
) -> None:
    import certs

    certs.issue(tmp_path / "certs", [])
    environment = {**flwr_home, "FLWR_HOME": str(tmp_path / "flwr")}
    port = flwr_home["MEDFED_PORT"]
    ca = str(tmp_path / "certs" / "ca.crt")
    connect = ["medfed", "connect", "--superlink", f"127.0.0.1:{port}", "--ca", ca]
    on_host(connect, environment, timeout=60)
    with pytest.raises(AssertionError, match=r"(?i)certificate|connect|ssl"):
        on_host(["flwr", "run", ".", "local-deployment"], environment, timeout=120)


def test_docker_compose_up_ends_its_demo_on_the_real_weights_with_20_healthy(
    federation: Federation,
) -> None:
    project = federation.project
    # The tiny runs are runs that ended well: without them this is a first `docker compose up`.
    project.python("superlink", "import shutil; shutil.rmtree('/medfed/runs', ignore_errors=True)")
    project.compose("up", "--detach", timeout=300)
    seconds = until(
        lambda: project.container("demo").status == "exited",
        900,
        lambda: project.container("demo").logs(tail=20).decode(),
    )
    log = project.container("demo").logs().decode()
    assert project.container("demo").attrs["State"]["ExitCode"] == 0, log
    losses = re.search(r"held-out loss: ([0-9.]+) before training, ([0-9.]+) after", log)
    assert losses, log
    print(f"demo on the real weights: {seconds:.0f} s, {losses[0]}")
    assert float(losses[2]) < float(losses[1])
    until(
        lambda: set(project.health().values()) == {"healthy"},
        120,
        lambda: f"not healthy after the run: {project.health()}",
    )
    again = project.compose("up", "--no-log-prefix", "demo", timeout=120)
    assert "ended well before" in again.stdout, "a second `docker compose up` trains nothing"


def test_gpu_slices_are_seen_with_the_mix_in_and_never_without_it(project: ComposeProject) -> None:
    plain = project.config("docker-compose.yml")["services"]
    assert not any("devices" in json.dumps(service) for service in plain.values())
    sliced = project.config("docker-compose.yml", "docker-compose.gpu.yml")["services"]
    for entry in roster.load().supernodes:
        service = sliced[entry.name]
        devices = service["deploy"]["resources"]["reservations"]["devices"]
        assert [device["device_ids"] for device in devices] == [[entry.gpu and entry.gpu.device]]
        assert service["command"][-1] == "--gpu"
        assert service["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
        rest = {key: value for key, value in service.items() if key in ("volumes", "cpus", "image")}
        assert rest.items() <= plain[entry.name].items(), "the mix-in changes nothing else"
    assert sliced["superlink"] == plain["superlink"]


def test_the_developers_own_env_file_does_not_reach_the_tests(project: ComposeProject) -> None:
    assert project.config("docker-compose.yml")["name"] == project.name
    assert os.environ.get("COMPOSE_PROJECT_NAME") != project.name
    assert set(FEDERATION) < set(project.config("docker-compose.yml")["services"])
