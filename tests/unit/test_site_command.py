"""``medfed site``: what a hospital's engineer sees and decides."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from common.errors import SuperNodeError
from medfed.commands.site import SiteError, app
from supernode.gate import policy, review
from supernode.gate.audit import LOG, AuditLog
from tests.e2e.warm_federation import write_app

ROOT = Path(__file__).parents[2]


def fab_of(files: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in {"pyproject.toml": "", **files}.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def site(home: Path) -> Path:
    medfed("init", "supernode-07")
    return home / "sites" / "supernode-07"


def medfed(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fab_file(home: Path, name: str, files: dict[str, str]) -> Path:
    path = home / name
    path.write_bytes(fab_of(files))
    return path


def test_a_fab_is_reviewed_approved_and_the_next_one_shown_as_a_difference(site, home):
    first = fab_file(home, "1.fab", {"app/a.py": "x = 1\ny = 2\n"})
    told = medfed("review", first)
    assert hashlib.sha256(first.read_bytes()).hexdigest() in told
    assert "this is the whole code" in told
    assert "=== app/a.py\nx = 1\ny = 2\n" in told
    medfed("approve", first, "--by", "Dr. A", "--note", "read it")
    (approval,) = policy.load(site / "policy.toml").approvals
    assert (approval.approved_by, approval.note) == ("Dr. A", "read it")

    second = fab_file(home, "2.fab", {"app/a.py": "x = 1\ny = 3\n", "app/b.py": "z = 4\n"})
    told = medfed("review", second)
    assert "approved by Dr. A on " in told
    assert "--- a/app/a.py\n+++ b/app/a.py\n@@ -1,3 +1,3 @@\n x = 1\n-y = 2\n+y = 3" in told
    assert "--- /dev/null\n+++ b/app/b.py" in told
    assert "=== app/a.py" not in told
    assert "=== app/a.py" in medfed("review", second, "--code")


def test_approving_twice_changes_nothing(site, home):
    fab = fab_file(home, "1.fab", {})
    medfed("approve", fab, "--by", "Dr. A")
    before = (site / "policy.toml").read_bytes()
    assert "was approved before" in medfed("approve", fab, "--by", "Dr. B")
    assert (site / "policy.toml").read_bytes() == before


def test_who_is_several_hospitals_may_decide_for_each_by_name(home):
    names = ("supernode-00", "supernode-01", "supernode-02")
    medfed("init", *names)
    fab = fab_file(home, "1.fab", {})
    medfed("approve", fab, "--by", "Dr. A", "--site", names[0], "--site", names[1])
    approved = [len(policy.load(home / "sites" / name / "policy.toml").approvals) for name in names]
    assert approved == [1, 1, 0]


def test_the_folder_of_an_app_stands_for_its_fab(site, tmp_path):
    from flwr.cli.build import build_fab_from_disk

    folder = write_app(tmp_path / "small")
    medfed("approve", folder, "--by", "Dr. A")
    digest = hashlib.sha256(build_fab_from_disk(folder)).hexdigest()
    assert policy.load(site / "policy.toml").approval(digest) is not None


def test_a_difference_is_to_a_fab_whose_bytes_are_still_those_approved(site, home):
    fab = fab_file(home, "1.fab", {"app/a.py": "x = 1\n"})
    medfed("approve", fab, "--by", "Dr. A")
    (kept,) = (site / "fabs").iterdir()
    kept.write_bytes(fab_of({"app/a.py": "x = 2\n"}))
    assert "this is the whole code" in medfed("review", fab)


@pytest.mark.parametrize(
    ("fab", "found"),
    [
        (b"not a zip", "not a zip"),
        (fab_of({"pyproject.toml": ""})[:-1], "zip"),
        (b"", "zip"),
    ],
)
def test_what_is_no_fab_is_refused(site, home, fab, found):
    (home / "1.fab").write_bytes(fab)
    with pytest.raises(SuperNodeError, match="expected a Flower App Bundle") as caught:
        medfed("approve", home / "1.fab", "--by", "Dr. A")
    assert found in str(caught.value)
    assert policy.load(site / "policy.toml").approvals == ()


def test_a_fab_that_hides_a_file_behind_another_is_refused():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for content in ("good", "bad"):
            archive.writestr("pyproject.toml", content)
    with pytest.raises(SuperNodeError, match="in it twice"):
        review.unpack(stream.getvalue(), "fab")


@given(st.text())
def test_nothing_that_is_shown_can_move_the_cursor_or_reorder_code(line):
    shown = review.visible(line)
    for hidden in ("\x1b", "\r", "\b", "\u202e", "\u2066", "\u2028", "\x9b"):
        assert hidden not in shown
    plain = "".join(character for character in line if 32 <= ord(character) < 127)
    assert all(character in shown for character in plain)


def test_the_log_is_verified_and_shown(site):
    log = AuditLog(site / "audit")
    log.append("started", name="supernode-07")
    log.append("reply", decision="released", bytes_out=12)
    told = medfed("audit")
    assert 'name="supernode-07"' in told
    assert 'decision="released"  bytes-out=12' in told
    content = json.loads(medfed("audit", "--json", "--head", log.head))
    assert (content["ok"], content["lines"], content["head"]) == (True, 2, log.head)
    assert content["entries"][1]["bytes-out"] == 12


def test_a_broken_log_is_an_error_that_names_the_line(site, home):
    log = AuditLog(site / "audit")
    for number in range(3):
        log.append("message", n=number)
    path = site / "audit" / LOG
    path.write_bytes(path.read_bytes().replace(b'"n": 1', b'"n": 7'))
    for more, stream in (((), "stderr"), (("--json",), "stdout")):
        done = subprocess.run(
            [sys.executable, "-m", "medfed.cli", "site", "audit", *more],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 1
        assert f"{LOG}:2: " in getattr(done, stream)
        assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["line"] == 2


@pytest.mark.parametrize(
    ("made", "arguments", "said"),
    [
        ((), ("audit",), "expected one site .* found none"),
        (("a", "b"), ("audit",), "found a, b"),
        (("a",), ("audit", "--site", "b"), "sites/b/policy.toml, found none"),
        (("a",), ("approve", "nowhere.fab", "--by", "me"), "expected a FAB at nowhere.fab"),
        (("a",), ("approve", ".", "--by", " "), "expected who approves it"),
    ],
)
def test_which_site_and_which_fab_must_be_clear(home, made, arguments, said):
    for name in made:
        medfed("init", name)
    with pytest.raises(SiteError, match=said) as caught:
        medfed(*arguments)
    assert caught.value.hint


def test_a_site_may_be_any_folder(home, tmp_path):
    medfed("init", f"{tmp_path}/elsewhere")
    assert (tmp_path / "elsewhere" / "policy.toml").is_file()
    medfed("audit", "--site", f"{tmp_path}/elsewhere")
