"""The Compose files: rendered from the roster, and each service hardened."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from common.errors import SuperNodeError
from medfed.commands.compose import app
from supernode import compose
from supernode.roster import GpuSlice, Roster, SuperNodeEntry, load

ROOT = Path(__file__).resolve().parents[2]
ONE_SHOTS = {"provision", "register", "demo"}


def services_of(file: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["services"]
    return found


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return services_of("docker-compose.yml")


@pytest.fixture(scope="module")
def volumes() -> set[str]:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return set(document["volumes"])


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Volume → where it is mounted, with ``:ro`` where it is read-only."""
    return dict(entry.split(":", 1) for entry in service.get("volumes", []))


def test_the_committed_files_say_what_the_roster_says() -> None:
    assert compose.drift(ROOT, load()) == {}


def test_there_is_one_service_and_one_volume_for_each_supernode(
    services: dict[str, Any], volumes: set[str]
) -> None:
    names = set(load().names)
    assert set(services) == names | ONE_SHOTS | {"superlink", "gateway", "operator"}
    assert names <= volumes


def test_every_service_is_hardened(services: dict[str, Any]) -> None:
    desk = services_of("docker-compose.gate.yml")["site"]
    for name, service in (services | {"site": desk}).items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert service["pids_limit"] > 0, name
        assert service["mem_limit"], name
        assert "privileged" not in service, name
        assert "user" not in service, f"{name}: the image's own user, which is not root"


def test_a_supernode_mounts_its_own_volume_and_the_model_and_nothing_else(
    services: dict[str, Any],
) -> None:
    for name in load().names:
        assert mounts(services[name]) == {"models": "/medfed/models:ro", name: "/site:ro"}


def test_only_the_provision_service_has_the_ca_key_and_a_way_out(services: dict[str, Any]) -> None:
    assert [name for name, one in services.items() if "office" in mounts(one)] == ["provision"]
    assert [name for name, one in services.items() if "outside" in one["networks"]] == ["provision"]


def test_the_superlink_is_in_no_network_but_the_gateways(services: dict[str, Any]) -> None:
    assert "ports" not in services["superlink"]
    assert list(services["superlink"]["networks"]) == ["superlink"]
    assert {name for name, one in services.items() if "superlink" in one["networks"]} == {
        "superlink",
        "gateway",
        "operator",
    }


def test_only_gateways_are_published_and_only_on_this_machine_unless_configured(
    services: dict[str, Any],
) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {
        "gateway": ["${MEDFED_FLEET:-127.0.0.1:8443}:8443"],
        "operator": [
            "127.0.0.1:${MEDFED_PORT:-8000}:8000",  # no setting opens what asks for no certificate
            "${MEDFED_OPERATOR:-127.0.0.1:8444}:8443",
        ],
    }
    assert "--remote-operator=0.0.0.0:8443" in services["operator"]["command"]


def test_each_supernode_has_a_network_with_the_gateway_and_no_other(
    services: dict[str, Any],
) -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    subnets = set()
    for name in load().names:
        assert services[name]["networks"] == [name]
        members = [other for other, one in services.items() if name in one["networks"]]
        assert members == ["gateway", name]
        network = document["networks"][name]
        assert network["internal"] is True
        assert network["driver_opts"] == {"com.docker.network.bridge.inhibit_ipv4": "true"}
        subnets.add(network["ipam"]["config"][0]["subnet"])
    assert len(subnets) == len(load().names)


def test_more_supernodes_than_there_are_networks_for_are_refused() -> None:
    some = Roster(tuple(SuperNodeEntry(f"s{i}", i, 1, None) for i in range(251)))
    with pytest.raises(SuperNodeError, match="at most 250"):
        compose.render((ROOT / "docker-compose.yml").read_text(encoding="utf-8"), some)


def test_each_image_is_built_by_one_service(services: dict[str, Any]) -> None:
    built = [service["image"] for service in services.values() if "build" in service]
    assert len(built) == len(set(built)) == 3
    assert {service["image"] for service in services.values()} == set(built)


def test_both_images_share_their_first_stage_byte_for_byte() -> None:
    stages = set()
    for name in ("superlink", "supernode"):
        text = (ROOT / name / "Dockerfile").read_text(encoding="utf-8")
        stage, separator, _ = text.partition(f"\nFROM runtime AS {name}\n")
        assert separator, name
        stages.add(stage[: stage.rindex("WORKDIR")])
    assert len(stages) == 1


def test_every_image_stands_on_the_same_base_named_by_its_digest() -> None:
    files = [ROOT / name / "Dockerfile" for name in ("superlink", "supernode", "superlink/gateway")]
    (base,) = {
        default
        for file in files
        for default in re.findall(r"^FROM \$\{BASE_IMAGE:-(.*)\}", file.read_text(), re.MULTILINE)
    }
    assert re.fullmatch(r"python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", base)


def copied(dockerfile: Path, into: Path) -> None:
    """Copy what a Dockerfile copies out of this repository."""
    for line in dockerfile.read_text(encoding="utf-8").splitlines():
        if not line.startswith("COPY "):
            continue
        *sources, target = line.split()[1:]
        for source in sources:
            if source.endswith("/"):
                shutil.copytree(ROOT / source, into / target)
            else:
                (into / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, into / target)


@pytest.mark.parametrize(
    ("dockerfile", "programs", "packages"),
    [
        ("superlink", ["superlink.__main__", "superlink.health", "medfed.cli"], True),
        ("supernode", ["supernode.__main__", "supernode.health", "supernode.warm.__main__"], True),
        ("superlink/gateway", ["superlink.gateway.__main__", "superlink.health"], False),
    ],
)
def test_an_image_holds_all_that_its_programs_import(
    tmp_path: Path, dockerfile: str, programs: list[str], packages: bool
) -> None:
    copied(ROOT / dockerfile / "Dockerfile", tmp_path)
    installed = [place for place in sys.path if place.endswith("site-packages")]
    places = [str(tmp_path), *(installed if packages else [])]
    done = subprocess.run(
        # -S: not what an editable install points at, which is all of this repository.
        [sys.executable, "-S", "-c", f"import {', '.join(programs)}"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_builds_see_no_keys_and_no_data() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "an allow-list"
    for secret in ("**/*.key", "**/*.crt", "**/*.pem", "**/*.pub", "**/*.jsonl", "**/.medfed"):
        assert rules.index(secret) > max(i for i, rule in enumerate(rules) if rule[0] == "!")


def test_gpu_slices_are_only_in_the_mix_in(services: dict[str, Any]) -> None:
    assert not any("deploy" in service for service in services.values())
    sliced = services_of("docker-compose.gpu.yml")
    for entry in load().supernodes:
        assert entry.gpu is not None
        service = sliced[entry.name]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == [entry.gpu.device]
        assert service["command"] == [*services[entry.name]["command"], "--gpu"]


def test_a_gate_is_added_to_a_supernode_and_nothing_is_taken_away(
    services: dict[str, Any],
) -> None:
    gated = services_of("docker-compose.gate.yml")
    assert set(gated) == {"site", *load().names}
    for name in load().names:
        assert set(gated[name]) == {"entrypoint", "volumes"}, "--gpu comes with another command"
        own = services[name]["entrypoint"]
        assert gated[name]["entrypoint"] == [*own, "--site=/gate", "--audit=/audit"]
        assert mounts(gated[name]) == {f"{name}-gate": "/gate:ro", f"{name}-audit": "/audit"}


def test_where_hospitals_decide_there_are_their_policies_and_logs_and_no_network() -> None:
    desk = services_of("docker-compose.gate.yml")["site"]
    assert desk["network_mode"] == "none"
    assert desk["profiles"], "`docker compose up` decides nothing"
    expected = {}
    for name in load().names:
        expected[f"{name}-gate"] = f"/medfed/sites/{name}"
        expected[f"{name}-audit"] = f"/medfed/sites/{name}/audit:ro"
    assert mounts(desk) == expected


entries = st.builds(
    SuperNodeEntry,
    # Not `no` or `on`: this reader of YAML 1.1 takes them for truth values, Compose does not.
    name=st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True).filter(
        lambda name: yaml.safe_load(name) == name
    ),
    partition=st.integers(0, 99),
    cpus=st.floats(0.05, 64).map(lambda cpus: round(cpus, 2)),
    gpu=st.none() | st.builds(GpuSlice, device=st.sampled_from(["0", "MIG-a1"]), memory=st.just(1)),
)
rosters = st.lists(entries, min_size=1, max_size=9, unique_by=lambda entry: entry.name).map(
    lambda some: Roster(tuple(some))
)


@settings(max_examples=25, deadline=None)
@given(rosters)
def test_any_roster_renders_to_valid_yaml_and_rendering_again_changes_nothing(
    roster: Roster,
) -> None:
    for name in compose.FILES:
        text = compose.render((ROOT / name).read_text(encoding="utf-8"), roster)
        assert compose.render(text, roster) == text
        found = yaml.safe_load(text)["services"] or {}
        for entry in roster.supernodes:
            if name == "docker-compose.yml":
                assert found[entry.name]["cpus"] == entry.cpus
                assert entry.name in found["demo"]["depends_on"]
                assert f"{entry.name}:/sites/{entry.name}" in found["provision"]["volumes"]
            elif name == "docker-compose.gpu.yml":
                assert (entry.name in found) == (entry.gpu is not None)
            else:
                assert f"{entry.name}-gate:/gate:ro" in found[entry.name]["volumes"]


def test_institutions_reach_the_superlink_in_one_line() -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    text = document["services"]["superlink"]["environment"]["MEDFED_INSTITUTIONS"]
    assert [name.strip() for name in text.split(",")] == list(load().names)


def test_a_block_of_an_unknown_name_is_refused() -> None:
    with pytest.raises(SuperNodeError, match="found 'nonsense'"):
        compose.render("# rendered: nonsense\n# end\n", load())


def test_a_block_without_end_is_refused() -> None:
    with pytest.raises(SuperNodeError, match="end of the file"):
        compose.render("services:\n  # rendered: supernodes\n", load())


def test_check_fails_on_drift_and_changes_nothing(tmp_path: Path) -> None:
    for name in compose.FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("cpus: 1\n", "cpus: 7\n"), encoding="utf-8")
    before = (tmp_path / "docker-compose.yml").read_bytes()

    def run(*options: str) -> int:
        arguments = ["render", "--project", str(tmp_path), *options]
        return CliRunner().invoke(app, arguments).exit_code

    assert run("--check") == 1
    assert (tmp_path / "docker-compose.yml").read_bytes() == before
    assert run() == 0
    assert run("--check") == 0


def test_outside_the_repository_the_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SuperNodeError, match=r"docker-compose\.yml in .*found no such file"):
        compose.drift(tmp_path, load())
