"""SuperNodes' key pairs: elliptic curve P-384 in OpenSSH's formats, as Flower takes them.

The private key is what ``flower-supernode --auth-supernode-private-key`` reads, the public key what
``flwr supernode register`` reads; its comment is the SuperNode's name.
"""

from __future__ import annotations

import base64
import hashlib

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from common import keys
from common.errors import CertsError


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
    hint = "move the file and its .pub away and run `medfed certs issue` again"
    return keys.private_key(content, where, CertsError, hint)


def public_from_openssh(content: bytes, where: object) -> ec.EllipticCurvePublicKey:
    """Read a SuperNode's public key.

    Raises:
        CertsError: it is another kind of key, or none.
    """
    hint = "ask the SuperNode's owner for its .pub file again"
    return keys.public_key(content, where, CertsError, hint)


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the public key as ``ssh-keygen -lf`` prints it."""
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")
