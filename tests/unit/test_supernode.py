"""supernode/: what it is started with, and what stops it before it starts."""

from __future__ import annotations

import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st

import certs
from certs import pki as authority
from common.errors import SuperNodeError
from supernode import __main__ as entrypoint
from supernode import command, connection, health, preflight, roster
from supernode.command import Settings
from supernode.roster import GpuSlice, SuperNodeEntry

NAMES = ("supernode-00", "supernode-01")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pki") / "certs"
    certs.issue(folder, NAMES)
    return folder


@pytest.fixture
def settings(pki: Path, tmp_path: Path) -> Settings:
    data = tmp_path / "supernode-00"
    data.mkdir()
    (data / "train.jsonl").write_text('{"instruction": "a", "input": "b", "output": "c"}\n')
    return Settings(
        entry=SuperNodeEntry("supernode-00", 0, 1.0, GpuSlice("0", 0.05)),
        partition=0,
        num_partitions=20,
        superlink="127.0.0.1:8000",
        ca=pki / "ca.crt",
        key=pki / "supernodes" / "supernode-00.key",
        public_keys=pki / "supernodes",
        data=data,
    )


# What it is started with.


def test_flower_reads_the_node_config_back(settings):
    assert parse_config_args([command.node_config(settings)]) == {
        "partition-id": 0,
        "num-partitions": 20,
        "name": "supernode-00",
        "data-path": str(settings.data),
    }


@given(st.text("abcXYZ0189 ._-=#[]{}üß", min_size=1, max_size=30).map(str.strip).filter(bool))
def test_any_folder_name_survives_flowers_format(name):
    entry = SuperNodeEntry("n", 0, 1.0, None)
    at = Path("/data") / name
    one = Settings(entry, 0, 1, "a:1", Path("c"), Path("k"), Path("p"), at)
    assert parse_config_args([command.node_config(one)])["data-path"] == str(at.resolve())


@pytest.mark.parametrize("character", ['"', "'", "\\", "\n"])
def test_a_path_that_flowers_format_cannot_carry_is_refused(settings, character):
    with pytest.raises(SuperNodeError, match="without quotes"):
        command.node_config(replace(settings, data=Path(f"/data/a{character}b")))


def test_tls_and_authentication_are_always_on(settings):
    arguments = command.arguments(settings)
    assert "--insecure" not in arguments
    assert arguments[arguments.index("--root-certificates") + 1] == str(settings.ca)
    assert arguments[arguments.index("--auth-supernode-private-key") + 1] == str(settings.key)


def test_flower_takes_the_arguments(settings):
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    parsed = _parse_args_run_supernode().parse_args(command.arguments(settings)[1:])
    assert parsed.superlink == settings.superlink


def test_threads_follow_the_rosters_cpus(settings):
    entry = replace(settings.entry, cpus=3.5)
    variables = command.environment(replace(settings, entry=entry), {}, Path("/venv/bin"))
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"


def test_nothing_is_told_to_anybody(settings):
    variables = command.environment(settings, {}, Path("/venv/bin"))
    assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
    assert variables["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_clientapps_come_from_the_warm_process_only_where_there_is_one(settings):
    cold = command.environment(settings, {"PATH": "/bin"}, Path("/venv/bin"))
    assert cold["PATH"] == "/venv/bin:/bin"
    warm = command.environment(
        settings, {"PATH": "/bin", "MEDFED_WARM_SOCKET": "/run/warm"}, Path("/venv/bin")
    )
    assert warm["PATH"] == f"{command.WARM_BIN}:/venv/bin:/bin"
    assert (command.WARM_BIN / "flwr-clientapp").is_file()


def test_a_share_of_the_multiprocessors_reaches_the_clientapp(settings):
    entry = replace(settings.entry, gpu=GpuSlice(device="1", memory=0.5, mps=25))
    sliced = replace(settings, entry=entry, use_gpu=True)
    on = command.environment(sliced, {}, Path("/b"))
    assert on["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
    off = command.environment(replace(sliced, use_gpu=False), {}, Path("/b"))
    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in off


def test_a_gpu_is_seen_only_where_slices_are_switched_on(settings):
    inherited = {"CUDA_VISIBLE_DEVICES": "3", "MEDFED_GPU_MEMORY": "1"}
    off = command.environment(settings, inherited, Path("/b"))
    assert off["CUDA_VISIBLE_DEVICES"] == ""
    assert "MEDFED_GPU_MEMORY" not in off
    on = command.environment(replace(settings, use_gpu=True), {}, Path("/b"))
    assert (on["CUDA_VISIBLE_DEVICES"], on["MEDFED_GPU_MEMORY"]) == ("0", "0.05")


@pytest.mark.parametrize(
    ("address", "parts"),
    [("superlink:8000", ("superlink", 8000)), ("[::1]:443", ("::1", 443))],
)
def test_an_address_is_a_host_and_a_port(address, parts):
    assert command.split_address(address) == parts


@pytest.mark.parametrize("address", ["superlink", ":8000", "host:", "host:0", "host:70000"])
def test_a_malformed_address_is_refused(address):
    with pytest.raises(SuperNodeError, match="HOST:PORT"):
        command.split_address(address)


# The entrypoint says what is wrong on one line and exits with 1.


def start(settings: Settings, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    status = entrypoint.main(
        [
            *("--name", settings.name, "--superlink", settings.superlink),
            *("--ca", str(settings.ca), "--key", str(settings.key)),
            *("--data", str(settings.data), *more),
        ]
    )
    lines = capsys.readouterr().err.splitlines()
    assert status == 1
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]
    return lines[0]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {**os.environ, "FLWR_HOME": str(tmp_path / "flwr")})


def test_a_partition_outside_the_roster_is_refused(settings, capsys):
    assert "from 0 to 19, found 20" in start(settings, capsys, "--partition", "20")


def test_a_name_outside_the_roster_is_refused(settings, capsys):
    entry = replace(settings.entry, name="supernode-77")
    assert "found 'supernode-77'" in start(replace(settings, entry=entry), capsys)


def test_the_key_of_another_node_is_refused_and_its_owner_named(settings, capsys):
    other = replace(settings, key=settings.public_keys / "supernode-01.key")
    assert "found the key of supernode-01" in start(other, capsys)


def test_a_missing_partition_is_refused(settings, capsys):
    assert "no such folder" in start(replace(settings, data=settings.data / "no"), capsys)


# Preflight, one thing at a time.


def test_everything_in_order_passes(settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    preflight.check(replace(settings, runtime_port=port))


def test_a_missing_key_is_refused(settings):
    with pytest.raises(SuperNodeError, match="no such file"):
        preflight.read_key(settings.public_keys / "none.key")


def test_a_key_that_others_may_read_is_refused(settings, tmp_path):
    copy = tmp_path / "supernode-00.key"
    copy.write_bytes(settings.key.read_bytes())
    copy.chmod(0o640)
    with pytest.raises(SuperNodeError, match="0600"):
        preflight.read_key(copy)


def test_a_key_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "a.key"
    key = ed25519.Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(SuperNodeError, match="elliptic-curve key"):
        preflight.read_key(path)
    path.write_text("nothing of the kind")
    with pytest.raises(SuperNodeError, match="OpenSSH private key"):
        preflight.read_key(path)


def test_a_key_of_nobody_is_refused(settings, tmp_path):
    certs.issue(tmp_path / "other", ["supernode-00"])
    stranger = tmp_path / "other" / "supernodes" / "supernode-00.key"
    with pytest.raises(SuperNodeError, match=r"does not belong to supernode-00\.pub"):
        preflight.check_key("supernode-00", stranger, settings.public_keys)


def test_what_is_no_certificate_is_refused_as_ca(tmp_path):
    with pytest.raises(SuperNodeError, match="no such file"):
        preflight.trust(tmp_path / "ca.crt")
    (tmp_path / "ca.crt").write_text("nothing of the kind")
    with pytest.raises(SuperNodeError, match="PEM certificate"):
        preflight.trust(tmp_path / "ca.crt")


@pytest.mark.parametrize(
    ("name", "content"),
    [("train.jsonl", "\n\n"), ("rows.csv", "instruction,input,output\n"), ("notes.txt", "rows")],
)
def test_a_partition_without_rows_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(SuperNodeError, match="expected rows"):
        preflight.check_partition_folder(tmp_path)


def test_rows_in_any_of_the_three_formats_are_found(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name in ("jsonl", "csv", "parquet"):
        (tmp_path / name).mkdir()
    (tmp_path / "jsonl" / "a.jsonl").write_text('\n{"instruction": "a"}\n')
    (tmp_path / "csv" / "a.csv").write_text('instruction\n"a\nb"\n')
    table = pyarrow.table({"instruction": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "a.parquet")
    for name in ("jsonl", "csv", "parquet"):
        preflight.check_partition_folder(tmp_path / name)
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "parquet" / "a.parquet")
    with pytest.raises(SuperNodeError, match="only empty files"):
        preflight.check_partition_folder(tmp_path / "parquet")


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(SuperNodeError, match=f"port {port} to be free"):
            preflight.check_port_is_free(port)


# Who answers at the SuperLink's address.


@pytest.fixture
def superlink(pki: Path) -> Iterator[int]:
    """A TLS server with the SuperLink's certificate; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "superlink.crt", pki / "superlink.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            try:
                context.wrap_socket(raw, server_side=True).close()
            except OSError:
                raw.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def never(_seconds: float) -> None:
    raise AssertionError("waited, though there is nothing to wait for")


def test_the_superlink_of_this_ca_is_accepted(settings, superlink):
    at = replace(settings, superlink=f"127.0.0.1:{superlink}")
    preflight.wait_for_superlink(at, say=print, sleep=never)


def test_the_wrong_ca_is_refused(settings, superlink, tmp_path):
    certs.issue(tmp_path / "other", [])
    at = replace(settings, superlink=f"localhost:{superlink}", ca=tmp_path / "other" / "ca.crt")
    with pytest.raises(SuperNodeError, match="found another CA's"):
        preflight.wait_for_superlink(at, say=print, sleep=never)


def test_a_name_that_the_certificate_lacks_is_refused(settings, superlink, monkeypatch):
    at = replace(settings, superlink=f"superlink.example.com:{superlink}")
    connect = socket.create_connection
    monkeypatch.setattr(  # resolve the name as a hospital's hosts file might
        socket,
        "create_connection",
        lambda address, **how: connect(("127.0.0.1", address[1]), **how),
    )
    with pytest.raises(SuperNodeError, match="found one for other names"):
        preflight.wait_for_superlink(at, say=print, sleep=never)


def test_a_server_without_tls_is_refused(settings):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            raw, _ = listener.accept()
            with raw:
                raw.recv(1024)
                raw.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        at = replace(settings, superlink=f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(SuperNodeError, match="does not speak it"):
            preflight.wait_for_superlink(at, say=print, sleep=never)
        thread.join(5)


def test_a_superlink_that_is_down_is_waited_for_and_that_is_said_once(settings, pki):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        at = replace(settings, superlink=f"127.0.0.1:{free.getsockname()[1]}")
        said: list[str] = []
        waits: list[float] = []

        class EnoughError(Exception):
            pass

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                raise EnoughError

        with pytest.raises(EnoughError):
            preflight.wait_for_superlink(at, say=said.append, sleep=sleep)
    assert len(said) == 1
    assert "waiting for the SuperLink" in said[0]
    assert "Connection refused" in said[0]


# Health: evidence of a connection, not of a process.


@pytest.fixture
def runtime() -> Iterator[int]:
    """A server that answers /health as a SuperNode's runtime port does; its port."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture
def evidence(settings: Settings, runtime: int) -> Iterator[Path]:
    logger = logging.getLogger("httpx")
    before = (list(logger.handlers), logger.level, logger.propagate)
    connection.record(replace(settings, runtime_port=runtime), node_id=42)
    yield connection.file()
    logger.handlers, logger.level, logger.propagate = before


def answer(url: str, status: int) -> None:
    logging.getLogger("httpx").info(
        'HTTP Request: %s %s "%s %d %s"', "POST", url, "HTTP/1.1", status, "whatever"
    )


def test_a_connected_supernode_is_healthy(evidence):
    assert health.problem(evidence) is None


def test_before_the_first_answer_it_is_not(tmp_path):
    assert health.problem(tmp_path / "none.json") == (
        "the SuperLink has not accepted this SuperNode yet"
    )


def test_without_answers_it_is_not(evidence):
    old = time.time() - 90
    os.utime(evidence, (old, old))
    assert "no answer from the SuperLink" in (health.problem(evidence) or "")


def test_a_success_of_the_fleet_api_is_evidence(evidence):
    os.utime(evidence, (1, 1))
    answer("https://superlink:8000/v1/fleet/pull-messages", 200)
    assert health.problem(evidence) is None


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("https://superlink:8000/v1/fleet/pull-messages", 401),
        ("https://superlink:8000/v1/fleet/send-node-heartbeat", 503),
        ("https://huggingface.co/api", 200),
    ],
)
def test_a_refusal_or_another_server_is_none(evidence, url, status):
    os.utime(evidence, (1, 1))
    answer(url, status)
    assert "no answer" in (health.problem(evidence) or "")


def test_a_dead_process_is_not_healthy(evidence):
    content = json.loads(evidence.read_text())
    evidence.write_text(json.dumps({**content, "pid": 2**22 + 1}))
    assert "is gone" in (health.problem(evidence) or "")


def test_a_dead_runtime_port_is_not_healthy(evidence):
    content = json.loads(evidence.read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        evidence.write_text(json.dumps({**content, "runtime-port": free.getsockname()[1]}))
        assert "Connection refused" in (health.problem(evidence) or "")


def trusts(evidence: Path, content: bytes | None) -> None:
    """Let the SuperNode behind ``evidence`` trust another CA file; None: one that is gone."""
    path = evidence.with_name("ca.crt")
    if content is not None:
        path.write_bytes(content)
    told = json.loads(evidence.read_text())
    evidence.write_text(json.dumps({**told, "ca": str(path)}))


def ending_in(*days: int) -> bytes:
    made = [authority.new_ca(authority.new_key(), lifetime=timedelta(days=one)) for one in days]
    return authority.bundle_to_pem(made)


def test_a_ca_that_soon_ends_is_said_and_the_supernode_is_well(evidence, capsys, monkeypatch):
    trusts(evidence, ending_in(10))
    monkeypatch.setenv("FLWR_HOME", str(evidence.parent))
    assert health.main() == 0
    assert "the CA ends in 9 days" in capsys.readouterr().out


@pytest.mark.parametrize("days", [(40,), (10, 400), (400, 10)])
def test_a_later_end_is_not_said_also_while_the_ca_is_rotated(evidence, days):
    trusts(evidence, ending_in(*days))
    assert health.expiry(evidence) is None


@pytest.mark.parametrize("content", [None, b"not a certificate"])
def test_a_ca_that_cannot_be_read_is_said(evidence, content):
    trusts(evidence, content)
    assert "cannot read the CA's certificate" in (health.expiry(evidence) or "")


def test_the_next_session_knows_the_last_ones_node_id(evidence):
    assert connection.last_node_id() == 42
    evidence.write_text("damaged")
    assert connection.last_node_id() is None


def test_the_default_roster_is_found():
    assert roster.load().num_partitions == 20


def test_an_option_that_was_renamed_is_taken_for_one_version_with_a_warning(capsys):
    given = ["--name=supernode-07", "--superlink=a:1", "--ca=ca", "--key=key", "--data=data"]
    _, timeout = entrypoint.parse([*given, "--patience=3"])
    assert timeout == 3.0
    assert "--patience is --activation-timeout now" in capsys.readouterr().err
    _, timeout = entrypoint.parse([*given, "--activation-timeout=3"])
    assert timeout == 3.0
    assert capsys.readouterr().err == ""
