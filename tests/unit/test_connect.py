"""medfed connect: two connections for the `flwr` command, and nothing else touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli
from flwr.cli.flower_config import read_superlink_connection

import certs
from common.errors import SuperLinkError
from medfed import connections
from medfed.processes import FederationError

THEIRS = """\
[superlink]
default = "mine"

[superlink.mine]
address = "superlink.example.org:443"

[superlink.local-deployment]
address = "127.0.0.1:1"
insecure = true
"""


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    certs.issue(tmp_path / "certs", [])
    return tmp_path / "certs" / "ca.crt"


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    return tmp_path / "flwr" / "config.toml"


def write(ca: Path, address: str = "127.0.0.1:8000") -> connections.Written:
    return connections.write(address=address, ca=ca, supernodes=20)


def test_both_connections_are_written(ca, config):
    written = write(ca)
    assert written.path == config
    assert written.changed == ("local-deployment", "local-simulation")
    deployment = read_superlink_connection("local-deployment")
    assert deployment.address == "127.0.0.1:8000"
    assert deployment.root_certificates == str(ca)
    assert not deployment.insecure
    simulation = read_superlink_connection("local-simulation")
    assert simulation.options is not None
    assert simulation.options.num_supernodes == 20


def test_the_ca_is_written_as_an_absolute_path(ca, monkeypatch):
    monkeypatch.chdir(ca.parent)
    write(Path("ca.crt"))
    assert read_superlink_connection("local-deployment").root_certificates == str(ca)


def test_what_else_stands_there_stays(ca, config):
    config.parent.mkdir()
    config.write_text(THEIRS)
    written = write(ca)
    assert written.default == "mine"
    found = tomli.loads(config.read_text())["superlink"]
    assert found["default"] == "mine"
    assert found["mine"] == {"address": "superlink.example.org:443"}
    assert "insecure" not in found["local-deployment"]


def test_a_second_run_changes_nothing(ca, config):
    write(ca)
    before = (config.read_bytes(), config.stat().st_mtime_ns)
    assert write(ca).changed == ()
    assert (config.read_bytes(), config.stat().st_mtime_ns) == before


def test_nothing_is_printed_by_flower(ca, capsys):
    write(ca)
    assert capsys.readouterr().out == ""


def test_a_missing_ca_is_refused_and_nothing_written(tmp_path, config):
    with pytest.raises(SuperLinkError, match="CA certificate"):
        write(tmp_path / "none.crt")
    assert not config.exists()


def test_what_is_no_certificate_is_refused_and_nothing_written(tmp_path, config):
    (tmp_path / "ca.crt").write_text("nothing of the kind")
    with pytest.raises(SuperLinkError, match="PEM certificate"):
        write(tmp_path / "ca.crt")
    assert not config.exists()


@pytest.mark.parametrize("address", ["https://a:8000", "a", "a:b", ":8000"])
def test_a_malformed_address_is_refused(ca, address, config):
    with pytest.raises(FederationError, match="HOST:PORT"):
        write(ca, address)
    assert not config.exists()


def test_a_damaged_config_is_refused_and_left_alone(ca, config):
    config.parent.mkdir()
    config.write_text("[superlink\n")
    with pytest.raises(FederationError, match="Flower config"):
        write(ca)
    assert config.read_text() == "[superlink\n"
    assert [path.name for path in config.parent.iterdir()] == ["config.toml"]
