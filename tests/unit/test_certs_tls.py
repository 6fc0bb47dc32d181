"""certs/ in real TLS handshakes: what is accepted, and each refusal's own reason."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import certs
from certs import files, pki


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certs.issue(tmp_path / "certs", [], ["superlink.example.org"])
    return tmp_path / "certs"


def handshake(folder: Path, ca: Path, host: str) -> str | None:
    """A TLS handshake in memory, both sides real; the protocol version that was agreed."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(folder / "superlink.crt", folder / "superlink.key")
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    client_context.load_verify_locations(ca)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(down, up, server_hostname=host)
    server = server_context.wrap_bio(up, down, server_side=True)
    waiting = [client, server]
    while waiting:
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                continue
    return client.version()


def reissue(folder: Path, start: datetime, lifetime: timedelta) -> None:
    ca = pki.certificate_from_pem((folder / "ca.crt").read_bytes(), "ca.crt")
    ca_key = pki.key_from_pem((folder / "ca.key").read_bytes(), "ca.key")
    key = pki.key_from_pem((folder / "superlink.key").read_bytes(), "superlink.key")
    certificate = pki.new_superlink_certificate(
        key, ca, ca_key, pki.DEFAULT_SANS, not_before=start, lifetime=lifetime
    )
    files.write(folder / "superlink.crt", pki.certificate_to_pem(certificate), files.PUBLIC)


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "::1", "superlink", "superlink.example.org"]
)
def test_the_federations_ca_accepts_every_name_of_the_superlink(folder, host):
    assert handshake(folder, folder / "ca.crt", host) == "TLSv1.3"


def test_another_ca_refuses_the_superlink(folder, tmp_path):
    certs.issue(tmp_path / "other", [])
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(folder, tmp_path / "other" / "ca.crt", "localhost")


@pytest.mark.parametrize("host", ["superlink.example.com", "127.0.0.2"])
def test_a_name_that_is_not_in_the_certificate_is_refused(folder, host):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(folder, folder / "ca.crt", host)


def test_an_expired_certificate_is_refused(folder):
    reissue(folder, datetime.now(UTC) - timedelta(days=2), timedelta(days=1))
    with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
        handshake(folder, folder / "ca.crt", "localhost")


def test_a_certificate_that_is_not_yet_valid_is_refused(folder):
    reissue(folder, datetime.now(UTC) + timedelta(days=1), timedelta(days=1))
    with pytest.raises(ssl.SSLCertVerificationError, match="not yet valid"):
        handshake(folder, folder / "ca.crt", "localhost")


def test_a_certificate_renewed_by_the_same_ca_is_accepted_again(folder):
    reissue(folder, datetime.now(UTC) - timedelta(days=2), timedelta(days=1))
    certs.issue(folder, [])
    assert handshake(folder, folder / "ca.crt", "localhost") == "TLSv1.3"
