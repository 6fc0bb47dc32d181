"""The site gate of a hospital's container: what it did not approve does not run, nor leave.

Two SuperNodes under docker-compose.gate.yml, whose hospitals decide in one-shot containers, as
docs/site.md has it. What they approve is the app of gated_app.py; the refusals that it provokes are
those of test_site_gate.py, which has the same on processes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from superlink.control import Control
from tests.e2e.compose_project import COORDINATOR, GATED, NAMES, ROOT, ComposeProject, until
from tests.e2e.gated_app import GOOD, REFUSED, SIZE, STRANGER, altered, write_app

pytestmark = pytest.mark.containers

# Not those of the perimeter's tests, of which one is revoked at the end.
SITES = NAMES[3:5]
FIRST, SECOND = SITES
UNDECIDED = NAMES[5]
AT_BOTH = tuple(option for name in SITES for option in ("--site", name))
LOG = "/audit/log.jsonl"


@dataclass(frozen=True)
class Gated:
    """The federation, two of its SuperNodes behind a gate.

    Args:
        project: its Compose project.
        ca: its CA certificate.
        fab: the FAB that both hospitals have approved.
    """

    project: ComposeProject
    ca: Path
    fab: bytes

    def site(
        self, *arguments: str, fab: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`medfed site` in its one-shot container, in which ``fab`` lies at /app.fab."""
        return decide(self.project, *arguments, fab=fab, check=check)

    def run(self, fab: bytes, **config: str) -> list[dict[str, Any]]:
        """Run the app to its end; what its ServerApp was told, round by round and by name."""
        out = f"/tmp/out-{time.monotonic_ns()}.json"  # noqa: S108  (the SuperLink's container's)
        config |= {"out": out, "names": " ".join(SITES)}
        with Control(f"127.0.0.1:{self.project.port}", self.ca) as control:
            run = control.start_run(fab, config)
            until(lambda: control.run(run).finished, 120, lambda: self.said(FIRST))
            found = control.run(run)
            assert found.status == "completed", "".join(control.logs(run)) + found.details
        told = self.project.python("superlink", f"print(open({out!r}).read())")
        rounds: list[dict[str, Any]] = json.loads(told)
        return rounds

    def audited(self, name: str) -> list[dict[str, Any]]:
        """The lines of a site's log, once its chain has been verified."""
        found = json.loads(self.site("audit", "--site", name, "--json").stdout)
        assert found["ok"] is True
        entries: list[dict[str, Any]] = found["entries"]
        return entries

    def said(self, name: str) -> str:
        """The end of a SuperNode's log."""
        return str(self.project.container(name).logs(tail=40).decode())

    def begin_anew(self, name: str) -> None:
        """Replace a SuperNode's container, as an update of its image does."""
        recreate = ("up", "--detach", "--no-deps", "--force-recreate", name)
        self.project.compose(*GATED, *recreate)
        healthy(self.project, name)


def decide(
    project: ComposeProject, *arguments: str, fab: Path | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    mount = () if fab is None else ("--volume", f"{fab}:/app.fab:ro")
    return project.compose(*GATED, "run", "--rm", "-T", *mount, "site", *arguments, check=check)


def healthy(project: ComposeProject, *services: str) -> None:
    until(
        lambda: {project.health().get(service) for service in services} == {"healthy"},
        120,
        lambda: f"not healthy in time: {project.health()}",
    )


@pytest.fixture(scope="module")
def gated(provisioned: ComposeProject, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gated]:
    project, folder = provisioned, tmp_path_factory.mktemp("gated")
    fab = folder / "small.fab"
    fab.write_bytes(write_app(folder / "small"))
    fab.chmod(0o644)
    decide(project, "init", *SITES, "--parameters", str(SIZE))
    decide(project, "approve", "/app.fab", "--by", "Dr. A", *AT_BOTH, fab=fab)
    project.compose(*GATED, "up", "--detach", *COORDINATOR, *SITES)
    healthy(project, *COORDINATOR, *SITES)
    ca = folder / "ca.crt"
    ca.write_text(project.python("superlink", "print(open('/medfed/certs/ca.crt').read())"))
    yield Gated(project, ca, fab.read_bytes())
    # Whoever comes next finds them as they are without this setting.
    project.compose("up", "--detach", "--no-deps", *SITES)
    healthy(project, *SITES)


@pytest.fixture(scope="module")
def rounds(gated: Gated) -> dict[str, dict[str, Any]]:
    """One run: a round for each thing that the first site's app tries, good ones around them."""
    steps = ["good", *REFUSED, "raise", "last"]
    return dict(zip(steps, gated.run(gated.fab, steps=" ".join(steps)), strict=True))


# --- what leaves ---


def test_what_is_allowed_leaves_unchanged(rounds: dict[str, Any]) -> None:
    assert rounds["good"] == dict.fromkeys(SITES, GOOD)


@pytest.mark.parametrize("step", REFUSED)
def test_what_is_not_allowed_becomes_an_error_that_says_so_and_the_round_goes_on(
    rounds: dict[str, Any], step: str
) -> None:
    error = rounds[step][FIRST]["error"]
    assert error.startswith(f"site gate of {FIRST}: its reply was withheld: ")
    assert REFUSED[step] in error
    assert rounds[step][SECOND] == GOOD


def test_no_word_of_a_record_reached_the_coordinator(gated: Gated, rounds: dict[str, Any]) -> None:
    assert (
        rounds["raise"][FIRST]["error"] == "the ClientApp raised an exception; its words stay here"
    )
    row = gated.project.python(FIRST, "print(open('/site/data/train.jsonl').readline())")
    record = json.loads(row)["output"]
    assert any(record[:40] in str(entry.get("detail")) for entry in gated.audited(FIRST))
    search = f"""
from pathlib import Path
words = {[record[:40], "its reply was withheld"]!r}
files = [p for f in ("/medfed/superlink", "/tmp") for p in Path(f).rglob("*") if p.is_file()]
found = b"".join(path.read_bytes() for path in files)
print(*(word.encode() in found for word in words))
"""
    assert gated.project.python("superlink", search) == "False True", "the second is to be found"


def test_the_node_lives_on_and_trains_what_comes_next(gated: Gated, rounds: dict[str, Any]) -> None:
    assert rounds["last"] == dict.fromkeys(SITES, GOOD)
    for name in SITES:
        assert gated.project.container(name).attrs["RestartCount"] == 0
        assert gated.project.health()[name] == "healthy"


# --- what runs ---


@pytest.mark.parametrize("other", ["unapproved", "altered by a byte"])
def test_no_other_fab_runs_not_even_one_that_differs_in_a_byte(
    gated: Gated, tmp_path: Path, other: str
) -> None:
    stranger = write_app(tmp_path / "small", STRANGER)
    fab = stranger if other == "unapproved" else altered(gated.fab)
    digest = hashlib.sha256(fab).hexdigest()
    (told,) = gated.run(fab, steps="good")
    for name in SITES:
        expected = f"site gate of {name}: the FAB {digest[:12]} is not approved here"
        assert told[name]["error"].startswith(expected)
        last = gated.audited(name)[-1]
        assert (last["event"], last["decision"], last["fab"]) == ("fab", "refused", digest)
    installed = "import pathlib; print(*pathlib.Path('/medfed/flwr').rglob('*.py'))"
    assert digest[:8] not in gated.project.python(FIRST, installed)
    assert gated.run(gated.fab, steps="good") == [dict.fromkeys(SITES, GOOD)]
    assert hashlib.sha256(gated.fab).hexdigest()[:8] in gated.project.python(FIRST, installed)


def test_a_supernode_without_a_policy_does_not_start(gated: Gated) -> None:
    start = ("run", "--rm", "-T", "--no-deps", UNDECIDED)
    done = gated.project.compose(*GATED, *start, check=False, timeout=60)
    assert done.returncode == 1
    assert "expected this hospital's policy at /gate/policy.toml, found no such file" in (
        done.stdout + done.stderr
    )


def test_a_supernode_can_write_its_log_and_not_its_policy(gated: Gated) -> None:
    attempt = """
import errno
for place in ("/gate/policy.toml", "/gate/fabs/x", "/audit/x"):
    try:
        open(place, "a").close()
    except OSError as error:
        print(errno.errorcode[error.errno])
    else:
        print("written")
import os; os.unlink("/audit/x")
"""
    assert gated.project.python(FIRST, attempt).split() == ["EROFS", "EROFS", "written"]


# --- the log ---


def test_every_message_and_decision_is_in_the_log_on_its_volume(
    gated: Gated, rounds: dict[str, Any]
) -> None:
    entries = gated.audited(FIRST)
    assert entries[0]["event"] == "started"
    run = next(entry["run"] for entry in entries if entry["event"] == "reply")
    expected = ["released", *["refused"] * len(REFUSED), "error", "released"]
    assert [
        entry["decision"]
        for entry in entries
        if (entry["event"], entry.get("run")) == ("reply", run)
    ] == expected


def test_a_changed_log_is_found_out_and_the_unchanged_one_is_whole(
    gated: Gated, rounds: dict[str, Any]
) -> None:
    change = f"""
import shutil
shutil.copy({LOG!r}, "/tmp/kept")
content = open({LOG!r}, "rb").read()
open({LOG!r}, "r+b").write(content.replace(b'"decision": "refused"', b'"decision": "allowed"', 1))
"""
    put_back = f"open({LOG!r}, 'r+b').write(open('/tmp/kept', 'rb').read())"
    assert gated.audited(FIRST)
    gated.project.python(FIRST, change)
    try:
        done = gated.site("audit", "--site", FIRST, "--json", check=False)
    finally:
        gated.project.python(FIRST, put_back)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    assert gated.audited(FIRST)


def test_what_one_hospital_approves_later_runs_there_from_its_next_start_on(
    gated: Gated, tmp_path: Path
) -> None:
    path = tmp_path / "new.fab"
    path.write_bytes(write_app(tmp_path / "small", STRANGER))
    path.chmod(0o644)
    told = gated.site("review", "/app.fab", "--site", FIRST, fab=path).stdout
    assert f"+{STRANGER}" in told, "the difference to what was approved before"
    gated.site("approve", "/app.fab", "--by", "Dr. B", "--site", FIRST, fab=path)
    before = gated.audited(FIRST)
    gated.begin_anew(FIRST)
    (told_now,) = gated.run(path.read_bytes(), steps="good")
    assert told_now[FIRST] == GOOD
    assert "is not approved here" in told_now[SECOND]["error"]
    after = gated.audited(FIRST)
    assert after[: len(before)] == before, "the log outlives the container"
    assert after[len(before)]["event"] == "started"


def test_the_federations_own_app_is_the_same_fab_in_the_image_and_here(gated: Gated) -> None:
    told = gated.site("review", ".", "--site", SECOND).stdout
    assert hashlib.sha256(build_fab_from_disk(ROOT)).hexdigest() in told


def test_a_gate_and_a_slice_of_a_gpu_go_together(project: ComposeProject) -> None:
    files = ("docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.gate.yml")
    services = project.config(*files)["services"]
    for name in NAMES:
        service = services[name]
        assert service["command"][-1] == "--gpu"
        assert service["entrypoint"][-2:] == ["--site=/gate", "--audit=/audit"]
        assert {"/site", "/gate", "/audit"} < {mount["target"] for mount in service["volumes"]}
