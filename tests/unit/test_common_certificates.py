"""common/certificates.py: PEM read in one way and refused in each room's own words."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from certs import pki
from common import certificates
from common.errors import CertsError, SuperLinkError

KEY, OTHER_KEY = pki.new_key(), pki.new_key()
CA, OTHER_CA = pki.new_ca(KEY), pki.new_ca(OTHER_KEY)


def test_each_certificate_of_a_file_is_read():
    content = pki.bundle_to_pem([CA, OTHER_CA])
    assert certificates.read(content, "file", CertsError, "hint") == [CA, OTHER_CA]


@pytest.mark.parametrize("read", [certificates.read, certificates.private_key])
@pytest.mark.parametrize("content", [b"", b"no PEM", pki.certificate_to_pem(CA)[:200]])
def test_what_is_none_is_refused_in_the_rooms_own_error_with_its_hint(read, content):
    with pytest.raises(SuperLinkError, match=r"expected a PEM .* in the file, found") as refused:
        read(content, "the file", SuperLinkError, "make another")
    assert refused.value.hint == "make another"


def test_a_key_is_read_whatever_its_kind():
    key = rsa.generate_private_key(65537, 2048)
    content = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    read = certificates.private_key(content, "file", CertsError, "hint")
    assert read.public_key() == key.public_key()


def test_a_key_with_a_passphrase_is_refused():
    content = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    with pytest.raises(CertsError, match="without a passphrase in here"):
        certificates.private_key(content, "here", CertsError, "hint")


def test_a_key_belongs_to_its_own_certificate_alone():
    assert certificates.is_pair(CA, KEY)
    assert not certificates.is_pair(CA, OTHER_KEY)


def test_a_certificate_is_issued_by_the_ca_that_signed_it_alone():
    leaf = pki.new_superlink_certificate(pki.new_key(), CA, KEY, ["localhost"])
    assert certificates.is_issued_by(leaf, CA)
    assert not certificates.is_issued_by(leaf, OTHER_CA)


def test_a_ca_of_the_same_name_with_another_key_is_not_taken_for_the_issuer():
    forged = pki.new_superlink_certificate(pki.new_key(), CA, OTHER_KEY, ["localhost"])
    assert forged.issuer == CA.subject
    assert not certificates.is_issued_by(forged, CA)
