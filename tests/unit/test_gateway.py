"""The gateway, as real nginx on this machine: what passes, and each refusal's own reason."""

from __future__ import annotations

import http.client
import re
import select
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import certs
from certs import files, pki
from common.errors import SuperLinkError
from superlink.gateway import keys
from superlink.gateway.__main__ import main, parse
from superlink.gateway.config import UNKNOWN_KEY
from supernode import enrolment
from tests.gateway_stand import CONTROL, FLEET, NAMES, Stand, needs_nginx, stand, until

MB = 1 << 20
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Stand]:
    with stand() as place:
        yield place


@pytest.fixture
def fresh(gateway: Stand) -> Stand:
    gateway.arrived.clear()
    return gateway


def ca_of(folder: Path):
    certificate = pki.certificate_from_pem((folder / "ca.crt").read_bytes(), "ca.crt")
    return certificate, pki.key_from_pem((folder / "ca.key").read_bytes(), "ca.key")


# --- which requests pass ---


@needs_nginx
def test_an_institutions_fleet_request_passes_whole(fresh: Stand) -> None:
    answer = fresh.fleet(body=b"\x00\x01" * 1000)
    assert (answer.status, answer.body) == (200, '{"bytes": 2000}')
    assert [(request.path, len(request.body)) for request in fresh.arrived] == [(FLEET, 2000)]


@needs_nginx
@pytest.mark.parametrize(
    ("listener", "path", "reason"),
    [
        ("fleet", "/v1/control/start-run", "passes /v1/fleet/ alone"),
        ("fleet", "/v1/runtime/acquire-task", "passes /v1/fleet/ alone"),
        ("fleet", "/health", "passes /v1/fleet/ alone"),
        ("fleet", "/docs", "passes /v1/fleet/ alone"),
        ("operator", "/v1/fleet/pull-messages", "passes /v1/control/ alone"),
        ("operator", "/v1/runtime/acquire-task", "passes /v1/control/ alone"),
        ("operator", "/health", "passes /v1/control/ alone"),
    ],
)
def test_what_belongs_to_another_listener_or_to_none_is_refused(
    fresh: Stand, listener: str, path: str, reason: str
) -> None:
    answer = fresh.ask(listener, path, headers={"flwr-public-key": fresh.key(NAMES[0])})
    assert (answer.status, reason in answer.body) == (403, True)
    assert not fresh.arrived


@needs_nginx
@pytest.mark.parametrize(
    "path",
    [
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet/%252e%252e/control/start-run",
        "/v1/control/../fleet/pull-messages",
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet//pull-messages",
        "/v1/fleet%2fpull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=/v1/control/start-run",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull-messages;/../../control/start-run",
        "/V1/FLEET/pull-messages",
        "/v1/fleet\\..\\control\\start-run",
    ],
)
def test_no_other_spelling_of_a_path_passes(fresh: Stand, path: str) -> None:
    assert fresh.fleet(path).status in {400, 403}
    assert not fresh.arrived


@needs_nginx
def test_only_post_passes(fresh: Stand) -> None:
    for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW"):
        assert fresh.fleet(method=method).status in {400, 405}
    assert not fresh.arrived


@needs_nginx
def test_a_key_that_is_no_institutions_is_refused_at_the_gateway(fresh: Stand) -> None:
    known = fresh.key(NAMES[0])
    stranger = ec.generate_private_key(ec.SECP384R1()).public_key()
    path = fresh.folder / "stranger.pub"
    path.write_bytes(stranger.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    for value in (keys.header_value(path), known.swapcase(), known + " ", known[:-4], "", "x"):
        if value == known + " ":
            continue  # HTTP drops it: the same key
        answer = fresh.ask("fleet", FLEET, headers={"flwr-public-key": value})
        assert (answer.status, answer.body.strip()) == (401, UNKNOWN_KEY)
    assert not fresh.arrived


def test_a_supernode_knows_what_the_gateway_says_to_an_unknown_key() -> None:
    assert enrolment.UNKNOWN_KEY == UNKNOWN_KEY


@needs_nginx
def test_only_what_the_fleet_api_reads_arrives_each_once(fresh: Stand) -> None:
    key = fresh.key(NAMES[0])
    sent = (
        f"POST {FLEET} HTTP/1.1\r\nHost: superlink\r\nflwr-public-key: {key}\r\n"
        f"flwr-timestamp: first\r\nflwr-timestamp: second\r\nflwr-signature: s\r\n"
        f"flwr-public-key: {fresh.key(NAMES[1])}\r\nflwr-task-token: t\r\nX-Forwarded-For: 1\r\n"
        f"flwr-superexec-signature: s\r\nAuthorization: Bearer x\r\nContent-Length: 0\r\n\r\n"
    )
    assert b" 200 " in fresh.raw("fleet", sent.encode())
    ((_, value),) = [h for h in fresh.arrived[0].headers if h[0].lower() == "flwr-public-key"]
    assert value == key, "what the gateway looked at is what the SuperLink gets"
    names = sorted(name.lower() for name, _ in fresh.arrived[0].headers)
    assert names == [
        "content-length",
        "flwr-public-key",
        "flwr-signature",
        "flwr-timestamp",
        "host",
    ]


@needs_nginx
@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Content-Length: 0\r\nContent-Length: 44\r\n\r\n",
        "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_a_request_cannot_smuggle_a_second_one(fresh: Stand, framing: str) -> None:
    head = f"POST {FLEET} HTTP/1.1\r\nHost: x\r\nflwr-public-key: {fresh.key(NAMES[0])}\r\n"
    smuggled = "POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    fresh.raw("fleet", (head + framing + smuggled).encode("latin-1"))
    assert {request.path for request in fresh.arrived} <= {FLEET}


# --- sizes and rates ---


@needs_nginx
def test_a_body_is_taken_up_to_16_mb_and_not_beyond(fresh: Stand) -> None:
    assert fresh.fleet(body=bytes(15 * MB)).status == 200
    fresh.arrived.clear()
    head = f"POST {FLEET} HTTP/1.1\r\nHost: x\r\nflwr-public-key: {fresh.key(NAMES[0])}\r\n"
    said_beforehand = fresh.raw("fleet", f"{head}Content-Length: {16 * MB + 1}\r\n\r\n".encode())
    assert b" 413 " in said_beforehand
    assert not fresh.arrived


@needs_nginx
def test_a_body_without_an_end_is_cut_off_and_never_arrives(fresh: Stand) -> None:
    context = fresh.trust()
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # where nothing but an answer can be read
    connection = http.client.HTTPSConnection(
        "localhost", fresh.ports["fleet"], timeout=20, context=context
    )
    chunk = b"%x\r\n" % MB + bytes(MB) + b"\r\n"
    connection.putrequest("POST", FLEET)
    connection.putheader("flwr-public-key", fresh.key(NAMES[0]))
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent = 0
    while sent < 200 and not select.select([connection.sock], [], [], 0)[0]:
        connection.send(chunk)
        sent += 1
    assert connection.getresponse().status == 413
    assert 16 <= sent < 200
    connection.close()
    assert not fresh.arrived


@needs_nginx
def test_one_institution_that_asks_too_much_is_put_off_and_another_is_not(fresh: Stand) -> None:
    one = f"POST {FLEET} HTTP/1.1\r\nHost: x\r\nflwr-public-key: {fresh.key(NAMES[1])}\r\n"
    last = "Connection: close\r\nContent-Length: 0\r\n\r\n"
    at_once = f"{one}Content-Length: 0\r\n\r\n" * 999 + one + last
    answers = b"".join(fresh.stream("fleet", at_once.encode()))
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", answers)]
    assert len(statuses) == 1000
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 200, "a burst passes"
    assert fresh.fleet(name=NAMES[0]).status == 200
    assert fresh.said(f'"institution":"{NAMES[1]}"')


# --- who is on the other side ---


@needs_nginx
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1", "TLSv1_2", "TLSv1_3"])
def test_tls_1_2_and_1_3_are_spoken_and_nothing_older(fresh: Stand, version: str) -> None:
    context = fresh.trust()
    context.set_ciphers("ALL:@SECLEVEL=0")  # else this side would refuse, not the gateway
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    if version in {"TLSv1_2", "TLSv1_3"}:
        assert fresh.ask("operator", CONTROL, context=context).status == 200
    else:
        with pytest.raises(ssl.SSLError, match=r"(?i)protocol[ _]version"):
            fresh.ask("operator", CONTROL, context=context)


@needs_nginx
def test_plain_http_is_told_that_this_is_tls(fresh: Stand) -> None:
    connection = http.client.HTTPConnection("localhost", fresh.ports["fleet"], timeout=20)
    connection.request("POST", FLEET)
    response = connection.getresponse()
    assert response.status == 400
    assert b"plain HTTP request was sent to HTTPS port" in response.read()
    connection.close()


def as_operator(place: Stand, certificate: Path) -> ssl.SSLContext:
    context = place.trust()
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    return context


@needs_nginx
def test_the_remote_listener_lets_an_operator_in_and_names_them(fresh: Stand) -> None:
    context = as_operator(fresh, fresh.pki / "operator.crt")
    assert fresh.ask("remote-operator", CONTROL, context=context).status == 200
    assert fresh.ask("remote-operator", FLEET, context=context).status == 403
    assert [request.path for request in fresh.arrived] == [CONTROL]
    until(lambda: fresh.said('"operator":"medfed operator"'), fresh.tail)


def write_pair(folder: Path, certificate, key: ec.EllipticCurvePrivateKey) -> Path:
    folder.mkdir(exist_ok=True)
    files.write(folder / "x.key", pki.key_to_pem(key), files.PRIVATE)
    files.write(folder / "x.crt", pki.certificate_to_pem(certificate), files.PUBLIC)
    return folder / "x.crt"


def of_another_ca(folder: Path, _pki: Path) -> Path:
    certs.issue(folder / "other", ())
    return folder / "other" / "operator.crt"


def expired(folder: Path, pki_folder: Path) -> Path:
    key = pki.new_key()
    begun = datetime.now(UTC) - 3 * DAY
    certificate = pki.new_operator_certificate(
        key, *ca_of(pki_folder), not_before=begun, lifetime=DAY
    )
    return write_pair(folder, certificate, key)


def not_yet_valid(folder: Path, pki_folder: Path) -> Path:
    key = pki.new_key()
    certificate = pki.new_operator_certificate(
        key, *ca_of(pki_folder), not_before=datetime.now(UTC) + DAY
    )
    return write_pair(folder, certificate, key)


def of_the_superlink(_folder: Path, pki_folder: Path) -> Path:
    return pki_folder / "superlink.crt"


@needs_nginx
@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        (None, "No required SSL certificate was sent"),
        (of_another_ca, "unable to verify the first certificate|self.signed|unable to get local"),
        (expired, "certificate has expired"),
        (not_yet_valid, "certificate is not yet valid"),
        (of_the_superlink, "unsuitable certificate purpose|unsupported certificate purpose"),
    ],
)
def test_the_remote_listener_refuses_everyone_else(
    fresh: Stand,
    tmp_path: Path,
    certificate: Callable[[Path, Path], Path] | None,
    reason: str,
) -> None:
    context = fresh.trust()
    if certificate is not None:
        context = as_operator(fresh, certificate(tmp_path, fresh.pki))
    answer = fresh.ask("remote-operator", CONTROL, context=context)
    assert answer.status == 400
    assert not fresh.arrived
    if certificate is None:
        assert reason in answer.body
    else:
        assert "The SSL certificate error" in answer.body
        until(lambda: bool(re.search(reason, fresh.log.read_text())), fresh.tail)


@needs_nginx
def test_a_client_certificate_without_the_operator_role_is_refused(
    fresh: Stand, tmp_path: Path
) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    ca, ca_key = ca_of(fresh.pki)
    key = pki.new_key()
    # OU=operator inside the common name is a common name, not a role.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "eve,OU=operator,O=medfed")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(datetime.now(UTC) - DAY)
        .not_valid_after(datetime.now(UTC) + DAY)
        .sign(ca_key, hashes.SHA384())
    )
    context = as_operator(fresh, write_pair(tmp_path, certificate, key))
    answer = fresh.ask("remote-operator", CONTROL, context=context)
    assert (answer.status, "operator role" in answer.body) == (403, True)
    assert not fresh.arrived


def superlink_certificate(pki_folder: Path, target: Path, **options: object) -> Path:
    key = pki.new_key()
    sans = options.pop("sans", pki.DEFAULT_SANS)
    certificate = pki.new_superlink_certificate(key, *ca_of(pki_folder), sans, **options)  # type: ignore[arg-type]
    write_pair(target, certificate, key)
    (target / "x.crt").rename(target / "superlink.crt")
    (target / "x.key").rename(target / "superlink.key")
    return target


@needs_nginx
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("another CA", "unable to verify|unable to get local issuer|self.signed"),
        ({"sans": ["superlink.example.org"]}, "does not match"),
        ({"not_before": datetime.now(UTC) - 3 * DAY, "lifetime": DAY}, "has expired"),
        ({"not_before": datetime.now(UTC) + DAY}, "not yet valid"),
    ],
)
def test_a_superlink_that_cannot_prove_itself_gets_no_request(
    tmp_path: Path, options: str | dict[str, object], reason: str
) -> None:
    def serve(pki_folder: Path) -> Path:
        if isinstance(options, str):
            certs.issue(tmp_path / "other", ())
            return tmp_path / "other"
        return superlink_certificate(pki_folder, tmp_path / "bad", **options)

    with stand(serve) as place:
        assert place.fleet().status == 502
        assert not place.arrived
        until(lambda: bool(re.search(reason, place.log.read_text())), place.tail)


# --- while it runs ---


@needs_nginx
def test_institutions_come_and_go_and_certificates_are_renewed_without_a_restart() -> None:
    with stand() as place:
        first = place.pki / "supernodes" / f"{NAMES[0]}.pub"
        value, content = place.key(NAMES[0]), first.read_bytes()
        first.unlink()
        refused = lambda: place.ask("fleet", FLEET, headers={"flwr-public-key": value}).status  # noqa: E731
        until(lambda: refused() == 401, place.tail)
        assert place.fleet(name=NAMES[1]).status == 200
        first.write_bytes(content)
        until(lambda: refused() == 200, place.tail)

        twin = place.pki / "supernodes" / "twin.pub"
        twin.write_bytes(content)
        until(lambda: place.said("expected a key of its own"), place.tail)
        until(lambda: place.said("hint: one key, one institution"), place.tail)
        assert refused() == 200, "what was good goes on"
        twin.unlink()

        def served() -> bytes:
            return ssl.get_server_certificate(("localhost", place.ports["fleet"])).encode()

        before = served()
        superlink_certificate(place.pki, place.folder / "new")
        for name in ("superlink.key", "superlink.crt"):
            (place.folder / "new" / name).replace(place.pki / name)
        until(lambda: served() != before, place.tail)
        assert served().split() == (place.pki / "superlink.crt").read_bytes().split()


# --- keys and the command line ---


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_a_public_key_becomes_what_flowers_supernode_sends(
    tmp_path: Path, curve: type[ec.EllipticCurve]
) -> None:
    import base64

    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = ec.generate_private_key(curve()).public_key()
    path = tmp_path / "hospital.pub"
    path.write_bytes(key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b" comment\n")
    assert keys.header_value(path) == base64.b64encode(public_key_to_bytes(key)).decode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ecdsa-sha2-nistp384",
        b"ecdsa-sha2-nistp384 AAAA",
        b"ecdsa-sha2-nistp384 AAAAE2VjZHNhLXNoYTItbmlzdHAzODQ=",
        b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0000000000000000000000000000000000000000000",
        b"-----BEGIN PUBLIC KEY-----",
    ],
)
def test_what_is_no_such_key_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hospital.pub").write_bytes(content)
    with pytest.raises(SuperLinkError, match=r"expected an OpenSSH public key .*hospital\.pub"):
        keys.institutions(tmp_path)


def test_two_institutions_with_one_key_are_both_named(tmp_path: Path) -> None:
    certs.issue(tmp_path, ["a"])
    folder = tmp_path / "supernodes"
    (folder / "b.pub").write_bytes((folder / "a.pub").read_bytes())
    with pytest.raises(
        SuperLinkError, match=r"expected a key of its own in .*b\.pub, found that of a"
    ):
        keys.institutions(folder)


COMMON = ["--superlink=superlink:8000", "--certificate=c", "--key=k", "--ca=a", "--scratch=s"]


def test_a_gateway_that_listens_to_nobody_is_refused() -> None:
    with pytest.raises(SuperLinkError, match="expected something to listen on"):
        parse(COMMON)
    with pytest.raises(SuperLinkError, match="public keys for the fleet listener"):
        parse([*COMMON, "--fleet=0.0.0.0:1"])
    assert parse([*COMMON, "--operator=127.0.0.1:1"]).superlink_name == "superlink"


@needs_nginx
def test_a_missing_certificate_is_said_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{name}={tmp_path / name}" for name in ("certificate", "key", "ca", "scratch")]
    assert main(["--superlink=127.0.0.1:1", "--operator=127.0.0.1:1", *options]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "No such file" in said[0]
