"""SuperNodes' key pairs: elliptic curve P-384 in OpenSSH's formats, as Flower takes them.

The private key is what ``flower-supernode --auth-supernode-private-key`` reads, the public key what
``flwr supernode register`` reads; its comment is the SuperNode's name.
"""

from __future__ import annotations

import base64
import hashlib

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from .errors import CertsError


def private_to_openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as an OpenSSH PEM file without a passphrase."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def public_to_openssh(key: ec.EllipticCurvePublicKey, name: str) -> bytes:
    """The public key as one line: type, key, ``name``."""
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return line + b" " + name.encode("ascii") + b"\n"


def private_from_openssh(content: bytes, where: object) -> ec.EllipticCurvePrivateKey:
    """Read a SuperNode's private key.

    Raises:
        CertsError: it is another kind of key, or none.
    """
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertsError(
            f"expected an OpenSSH private key without a passphrase in {where}, "
            "found something else",
            "move the file and its .pub away and run `medfed certs issue` again",
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertsError(
            f"expected an elliptic-curve key in {where}, found {type(key).__name__}",
            "move the file and its .pub away and run `medfed certs issue` again",
        )
    return key


def public_from_openssh(content: bytes, where: object) -> ec.EllipticCurvePublicKey:
    """Read a SuperNode's public key.

    Raises:
        CertsError: it is another kind of key, or none.
    """
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise CertsError(
            f"expected an OpenSSH public key in {where}, found something else",
            "ask the SuperNode's owner for its .pub file again",
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise CertsError(
            f"expected an elliptic-curve key in {where}, found {type(key).__name__}",
            "Flower takes keys on a NIST curve: ssh-keygen -t ecdsa -b 384",
        )
    return key


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the public key as ``ssh-keygen -lf`` prints it."""
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")
