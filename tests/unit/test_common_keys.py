"""common/keys.py: SuperNodes' keys, read in one way and refused in each room's own words."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from common import keys
from common.errors import CertsError, SuperNodeError


def private_bytes(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_bytes(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def test_a_key_pair_is_read_back():
    key = ec.generate_private_key(ec.SECP384R1())
    private = keys.private_key(private_bytes(key), "file", CertsError, "hint")
    public = keys.public_key(public_bytes(key), "file", CertsError, "hint")
    assert private.public_key() == public == key.public_key()


@pytest.mark.parametrize("read", [keys.private_key, keys.public_key])
def test_what_is_no_key_is_refused_in_the_rooms_own_error_with_its_hint(read):
    with pytest.raises(SuperNodeError, match=r"expected an OpenSSH .* in the file") as refused:
        read(b"no key", "the file", SuperNodeError, "make another")
    assert refused.value.hint == "make another"


def test_a_key_on_no_nist_curve_is_refused():
    key = ed25519.Ed25519PrivateKey.generate()
    for read, content in (
        (keys.private_key, private_bytes(key)),
        (keys.public_key, public_bytes(key)),
    ):
        with pytest.raises(CertsError, match="elliptic-curve key in here, found"):
            read(content, "here", CertsError, "hint")
