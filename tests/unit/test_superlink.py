"""superlink/: what it is started with, and what stops it before it starts."""

from __future__ import annotations

import errno
import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import certs
from certs import files
from certs import pki as authority
from common.errors import SuperLinkError
from superlink import __main__ as entrypoint
from superlink import command, health, preflight
from superlink.command import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folder = tmp_path / "certs"
    certs.issue(folder, ["supernode-00"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Settings(
        certificate=folder / "superlink.crt",
        key=folder / "superlink.key",
        ca=folder / "ca.crt",
        database=tmp_path / "state.db",
        institutions=("supernode-00", "supernode-01"),
        port=port,
    )


def test_tls_authentication_and_a_durable_state_are_always_on(settings):
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

    arguments = command.arguments(settings)
    parsed = _parse_args_run_superlink().parse_args(arguments[1:])
    assert parsed.enable_supernode_auth
    assert not parsed.insecure
    assert not parsed.runtime_dependency_install
    assert parsed.database == str(settings.database)
    assert (parsed.ssl_certfile, parsed.ssl_keyfile, parsed.ssl_ca_certfile) == (
        str(settings.certificate),
        str(settings.key),
        str(settings.ca),
    )


def test_server_apps_learn_the_institutions_names(settings):
    variables = command.environment(settings, {"PATH": "/usr/bin"}, Path("/venv/bin"))
    assert variables["MEDFED_INSTITUTIONS"] == "supernode-00,supernode-01"
    assert variables["PATH"] == "/venv/bin:/usr/bin"
    assert variables["FLWR_TELEMETRY_ENABLED"] == "0"


def test_everything_in_order_passes(settings):
    preflight.check(settings)


def refused(settings: Settings, message: str) -> None:
    with pytest.raises(SuperLinkError, match=message) as caught:
        preflight.check(settings)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_a_missing_certificate_is_refused(settings):
    settings.certificate.unlink()
    refused(settings, "no such file")


def test_a_key_of_another_certificate_is_refused(settings):
    files.write(settings.key, authority.key_to_pem(authority.new_key()), files.PRIVATE)
    refused(settings, "to be the private key of")


def test_a_certificate_of_another_ca_is_refused(settings, tmp_path):
    certs.issue(tmp_path / "other", [])
    refused(replace(settings, ca=tmp_path / "other" / "ca.crt"), "another issuer")


def test_a_key_that_others_may_read_is_refused(settings):
    settings.key.chmod(0o644)
    refused(settings, "0600")


@pytest.mark.parametrize(("days", "message"), [(-10, "expired on"), (1, "starts on")])
def test_a_certificate_out_of_its_time_is_refused(settings, days, message):
    ca = authority.certificate_from_pem(settings.ca.read_bytes(), "ca")
    ca_key = authority.key_from_pem((settings.ca.parent / "ca.key").read_bytes(), "ca")
    key = authority.key_from_pem(settings.key.read_bytes(), "key")
    start = datetime.now(UTC) + timedelta(days=days)
    certificate = authority.new_superlink_certificate(
        key, ca, ca_key, ["localhost"], not_before=start, lifetime=timedelta(days=5)
    )
    files.write(settings.certificate, authority.certificate_to_pem(certificate), files.PUBLIC)
    refused(settings, message)


def test_a_database_folder_that_is_missing_is_refused(settings, tmp_path):
    refused(replace(settings, database=tmp_path / "none" / "state.db"), "no such folder")


def test_a_database_that_cannot_be_written_is_refused(settings, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(settings, "cannot be written")


def a_database(path: Path) -> bytes:
    with closing(sqlite3.connect(path)) as made:
        made.execute("CREATE TABLE replies (content)")
        made.executemany("INSERT INTO replies VALUES (?)", [("x" * 200,)] * 500)
        made.commit()
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "something else"])
def test_a_damaged_database_is_refused_and_left_alone(settings, damage):
    sound = a_database(settings.database)
    preflight.check(settings)
    content = {
        "truncated": sound[: len(sound) // 2],
        "overwritten": sound[:5000] + b"\xff" * 4000 + sound[9000:],
        "something else": b"not a database" * 1000,
    }[damage]
    settings.database.write_bytes(content)
    refused(settings, "found it damaged: ")
    assert settings.database.read_bytes() == content
    assert [path.name for path in settings.database.parent.glob("state*")] == ["state.db"]


def test_what_a_killed_superlink_left_behind_is_sound(settings):
    write_and_die = (
        "import os, sqlite3, sys; d = sqlite3.connect(sys.argv[1]);"
        "d.execute('PRAGMA journal_mode = WAL'); d.execute('CREATE TABLE t (x)'); d.commit();"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", write_and_die, str(settings.database)], check=False)
    assert settings.database.with_name("state.db-wal").stat().st_size > 0
    preflight.check(settings)
    assert settings.database.with_name("state.db-wal").stat().st_size > 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_volume_that_takes_nothing_more_is_refused(settings, monkeypatch, number):
    before = a_database(settings.database)

    def full(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    refused(settings, f"expected to write 4 MB in .*: {os.strerror(number)}")
    assert settings.database.read_bytes() == before


def test_a_port_in_use_is_refused_and_its_owner_named(settings):
    with socket.create_server(("127.0.0.1", settings.port)):
        refused(settings, rf"port {settings.port} to be free.*\(pid {os.getpid()}\)")


def test_an_address_of_another_machine_is_refused(settings):
    refused(replace(settings, host="192.0.2.1"), "expected to listen on")


def test_the_entrypoint_says_it_on_one_line(settings, capsys):
    settings.ca.unlink()
    status = entrypoint.main(
        [
            *("--certificate", str(settings.certificate), "--key", str(settings.key)),
            *("--ca", str(settings.ca), "--database", str(settings.database)),
        ]
    )
    assert status == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]
    assert not settings.database.exists()


def test_nobody_at_the_port_is_not_healthy(settings, capsys):
    arguments = ["--ca", str(settings.ca), "--port", str(settings.port)]
    assert health.main(arguments) == 1
    assert "Connection refused" in capsys.readouterr().err
