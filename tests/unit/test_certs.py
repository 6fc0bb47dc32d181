"""certs/: what is issued, what stays, what is refused."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
)
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

import certs
from certs import files, keys, pki

NAMES = ("supernode-00", "supernode-01")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certs.issue(tmp_path / "certs", NAMES)
    return tmp_path / "certs"


def test_everything_is_issued_at_once(folder):
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "ca.crt",
        "ca.key",
        "operator.crt",
        "operator.key",
        "superlink.crt",
        "superlink.key",
        "supernodes/supernode-00.key",
        "supernodes/supernode-00.pub",
        "supernodes/supernode-01.key",
        "supernodes/supernode-01.pub",
    ]


def test_private_keys_are_their_owners_only(folder):
    for path in folder.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for path in (folder, folder / "supernodes"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_second_run_changes_nothing(folder):
    before = contents(folder)
    assert certs.issue(folder, NAMES).actions == ()
    assert contents(folder) == before


def test_a_new_supernode_gets_a_key_and_the_others_keep_theirs(folder):
    before = contents(folder)
    issued = certs.issue(folder, (*NAMES, "supernode-02"))
    assert issued.actions == ("made the key pair of supernode-02",)
    assert before.items() <= contents(folder).items()


def test_flower_reads_both_halves_of_a_key_pair(folder):
    private = load_ssh_private_key((folder / "supernodes/supernode-00.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    public = try_load_public_key(folder / "supernodes/supernode-00.pub")
    assert public == public_key_to_bytes(private.public_key())


def test_the_comment_of_a_public_key_is_its_name(folder):
    line = (folder / "supernodes/supernode-01.pub").read_text()
    assert line.split()[0] == "ecdsa-sha2-nistp384"
    assert line.split()[2] == "supernode-01"


def test_a_missing_name_is_added_to_the_certificate_and_that_is_said(folder):
    certs.issue(folder, NAMES, ["superlink.example.org"])
    issued = certs.issue(folder, NAMES, ["192.0.2.7"])
    assert "added 192.0.2.7" in issued.actions[0]
    record = next(record for record in issued.records if record.kind == "superlink")
    assert record.sans == (*pki.DEFAULT_SANS, "superlink.example.org", "192.0.2.7")


def test_renewal_keeps_the_superlinks_key(folder):
    before = (folder / "superlink.key").read_bytes()
    certs.issue(folder, NAMES, ["superlink.example.org"])
    assert (folder / "superlink.key").read_bytes() == before


@pytest.mark.parametrize(("days", "said"), [(10, "9 days left"), (-1, "had expired")])
def test_a_certificate_that_soon_expires_is_renewed(folder, days, said):
    ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    ca_key = pki.key_from_pem((folder / "ca.key").read_bytes(), "ca.key")
    key = pki.key_from_pem((folder / "superlink.key").read_bytes(), "superlink.key")
    start = datetime.now(UTC) - timedelta(days=100)
    old = pki.new_superlink_certificate(
        key, ca, ca_key, pki.DEFAULT_SANS, not_before=start, lifetime=timedelta(days=100 + days)
    )
    files.write(folder / "superlink.crt", pki.certificate_to_pem(old), files.PUBLIC)
    assert said in certs.issue(folder, NAMES).actions[0]
    assert certs.issue(folder, NAMES).actions == ()


def test_a_public_key_without_private_half_is_a_hospitals_own(folder):
    (folder / "supernodes/supernode-00.key").unlink()
    assert certs.issue(folder, NAMES).actions == ()
    assert not (folder / "supernodes/supernode-00.key").exists()


def test_the_certificates_say_what_they_may_be_used_for(folder):
    ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()).extensions
    basic = ca.get_extension_for_class(x509.BasicConstraints)
    assert (basic.value.ca, basic.value.path_length, basic.critical) == (True, 0, True)
    leaf = x509.load_pem_x509_certificate((folder / "superlink.crt").read_bytes()).extensions
    assert not leaf.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = leaf.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature and not usage.key_cert_sign
    authority = leaf.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    subject = ca.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert authority.key_identifier == subject.digest


def test_inspect_names_fingerprints_and_expiry(folder):
    records = certs.inspect(folder)
    assert [record.name for record in records] == ["ca", "superlink", "operator", *NAMES]
    ca, superlink, operator, node, _ = records
    assert ca.not_after - ca.not_before == pki.CA_LIFETIME
    assert superlink.not_after - superlink.not_before == pki.SUPERLINK_LIFETIME
    assert operator.not_after - operator.not_before == pki.OPERATOR_LIFETIME
    assert node.not_after is None
    assert node.fingerprint.startswith("SHA256:")
    assert len(ca.fingerprint.split(":")) == 32


# Refusals: one line, a hint, and nothing is changed.


def refused(folder: Path, *expected: str) -> None:
    before = contents(folder)
    with pytest.raises(certs.CertsError) as caught:
        certs.issue(folder, NAMES)
    for text in expected:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert contents(folder) == before


def test_a_certificate_without_its_ca_key_is_refused(folder):
    (folder / "ca.key").unlink()
    refused(folder, "the CA's key", "found only its certificate")


def test_a_key_of_the_wrong_type_is_refused(folder):
    wrong = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = wrong.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    files.write(folder / "supernodes/supernode-00.key", pem, files.PRIVATE)
    refused(folder, "elliptic-curve", "RSAPrivateKey")


@pytest.mark.parametrize("name", ["ca.key", "superlink.key", "supernodes/supernode-00.key"])
def test_a_key_that_others_may_read_is_refused(folder, name):
    (folder / name).chmod(0o644)
    refused(folder, "0600", "0644")


def test_another_nodes_public_key_is_refused(folder):
    other = (folder / "supernodes/supernode-01.pub").read_bytes()
    (folder / "supernodes/supernode-00.pub").write_bytes(other)
    refused(folder, "supernode-00.pub", "another key")


def test_another_ca_key_is_refused(folder):
    files.write(folder / "ca.key", pki.key_to_pem(pki.new_key()), files.PRIVATE)
    refused(folder, "ca.key", "another's")


@pytest.mark.parametrize("name", ["ca.crt", "superlink.crt", "supernodes/supernode-00.pub"])
def test_a_damaged_file_is_refused(folder, name):
    (folder / name).write_text("not a certificate")
    refused(folder, "found something else")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(certs.CertsError, match="expected to make the folder"):
        certs.issue(tmp_path / "file" / "certs", NAMES)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(certs.CertsError, match="No space left"):
        certs.issue(tmp_path / "certs", NAMES)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("san", ["https://host", "a b", "", "-a.example", "host:8000"])
def test_what_is_no_name_and_no_address_is_refused(folder, san):
    with pytest.raises(certs.CertsError, match="DNS name or an IP address"):
        certs.issue(folder, NAMES, [san])


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "klinik-ü"])
def test_a_name_that_cannot_be_a_files_is_refused(folder, name):
    with pytest.raises(certs.CertsError, match="SuperNode's name"):
        certs.issue(folder, [name])


@settings(max_examples=20, deadline=None)
@given(st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True))
def test_every_key_pair_reads_back(name):
    key = pki.new_key()
    line = keys.public_to_openssh(key.public_key(), name)
    assert keys.public_from_openssh(line, name) == key.public_key()
    again = keys.private_from_openssh(keys.private_to_openssh(key), name)
    assert again.private_numbers() == key.private_numbers()
