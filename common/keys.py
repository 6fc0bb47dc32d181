"""SuperNodes' keys: elliptic curve, in OpenSSH's formats, as Flower takes them."""

from __future__ import annotations

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from common.errors import UserError


def private_key(
    content: bytes, where: object, error: type[UserError], hint: str
) -> ec.EllipticCurvePrivateKey:
    """Read a private key.

    Args:
        content: of an OpenSSH private key file without a passphrase.
        where: it was read from, for the message.
        error: what to raise.
        hint: what to do about a file that holds something else.

    Raises:
        UserError: the given kind of it: it is another kind of key, or none.
    """
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as found:
        raise error(
            f"expected an OpenSSH private key without a passphrase in {where}, found: {found}", hint
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _other(key, where, error)
    return key


def public_key(
    content: bytes, where: object, error: type[UserError], hint: str
) -> ec.EllipticCurvePublicKey:
    """Read a public key; arguments and errors as of :func:`private_key`."""
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        raise error(
            f"expected an OpenSSH public key in {where}, found something else", hint
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _other(key, where, error)
    return key


def _other(key: object, where: object, error: type[UserError]) -> UserError:
    return error(
        f"expected an elliptic-curve key in {where}, found {type(key).__name__}",
        "Flower takes keys on a NIST curve: ssh-keygen -t ecdsa -b 384",
    )
