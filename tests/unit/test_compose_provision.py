"""The one-shots of the Compose federation, and the federation seen from the host."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from medfed import composed, provision


@pytest.fixture
def fake_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH; a ``docker`` put there is what is called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def write_docker(folder: Path, script: str) -> None:
    program = folder / "docker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def test_without_docker_one_line_says_so(fake_docker: Path, tmp_path: Path) -> None:
    with pytest.raises(composed.ComposeError, match="the command docker, found none"):
        composed.published_address(tmp_path)


def test_a_federation_that_is_down_is_named_with_the_way_to_start_it(
    fake_docker: Path, tmp_path: Path
) -> None:
    write_docker(fake_docker, 'echo "service superlink is not running" >&2; exit 1')
    with pytest.raises(composed.ComposeError, match="superlink is not running") as caught:
        composed.fetch_ca(tmp_path, tmp_path / "home" / "ca.crt")
    assert "docker compose up" in caught.value.hint
    assert list((tmp_path / "home").iterdir()) == []


def test_the_ca_is_copied_out_of_the_superlink(fake_docker: Path, tmp_path: Path) -> None:
    write_docker(fake_docker, 'echo "$3" > "$4"')
    composed.fetch_ca(tmp_path, tmp_path / "home" / "ca.crt")
    copied = (tmp_path / "home" / "ca.crt").read_text()
    assert copied == "superlink:/medfed/certs/ca.crt\n"


def test_an_extra_ca_is_trusted_besides_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("EXTRA_CA", b"ours"), ("SYSTEM_CAS", b"everyone's")):
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(provision, name, tmp_path / name)
    for variable in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(variable, "as it was")
    provision.trust_extra_ca()
    bundle = Path(os.environ["PIP_CERT"])
    assert bundle.read_bytes() == b"everyone's\nours"
    assert os.environ["SSL_CERT_FILE"] == os.environ["REQUESTS_CA_BUNDLE"] == str(bundle)
    bundle.unlink()


@pytest.mark.parametrize("extra", ["/dev/null", "/no/such/file"])
def test_without_an_extra_ca_trust_stays_as_it_is(
    extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provision, "EXTRA_CA", Path(extra))
    monkeypatch.setenv("PIP_CERT", "as it was")
    provision.trust_extra_ca()
    assert os.environ["PIP_CERT"] == "as it was"


def test_the_wheelhouse_is_used_where_it_holds_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provision, "WHEELHOUSE", tmp_path)
    assert provision.wheelhouse_with("cards-1.whl") is None
    (tmp_path / "cards-1.whl").touch()
    assert provision.wheelhouse_with("cards-1.whl") == tmp_path


def test_only_a_run_with_a_summary_counts_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path))
    assert provision.finished_run() is None
    for age, run in enumerate(("newest", "older")):
        (tmp_path / "runs" / run).mkdir(parents=True)
        summary = tmp_path / "runs" / run / "summary.json"
        summary.touch()
        then = time.time() - 100 * age
        os.utime(summary, (then, then))
    (tmp_path / "runs" / "under-way").mkdir()
    assert provision.finished_run() == (tmp_path / "runs" / "newest").resolve()
