"""X.509 certificates and their keys in PEM, as every TLS library writes them."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from common.errors import UserError


def read(
    content: bytes, where: object, error: type[UserError], hint: str
) -> list[x509.Certificate]:
    """Read certificates, of which there is one at least.

    Args:
        content: of a PEM file.
        where: it was read from, for the message.
        error: what to raise.
        hint: what to do about a file that holds something else.

    Raises:
        UserError: the given kind of it: there is no certificate.
    """
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise error(f"expected a PEM certificate in {where}, found something else", hint) from None


def private_key(
    content: bytes, where: object, error: type[UserError], hint: str
) -> PrivateKeyTypes:
    """Read a private key without a passphrase; arguments and errors as of :func:`read`."""
    try:
        return load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as found:
        raise error(
            f"expected a PEM private key without a passphrase in {where}, found: {found}", hint
        ) from None


def is_pair(certificate: x509.Certificate, key: PrivateKeyTypes) -> bool:
    """Whether ``key`` is the private key of ``certificate``."""
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return certificate.public_key().public_bytes(*form) == key.public_key().public_bytes(*form)


def is_issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether ``ca`` signed ``certificate``."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
