"""The federation's CA, the SuperLink's certificate and the operator's.

SuperNodes and the ``flwr`` command trust this CA and nothing else. It signs two certificates: the
SuperLink's, a server's, and the operator's, a client's, which a gateway asks for where the Control
API is reached from elsewhere. SuperNodes have key pairs instead of certificates (``certs.keys``):
that is how Flower authenticates them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import certificates
from common.errors import CertsError

CA_LIFETIME = timedelta(days=5 * 365)
SUPERLINK_LIFETIME = timedelta(days=365)
OPERATOR_LIFETIME = timedelta(days=365)
# The subject's organisational unit by which a gateway knows an operator.
OPERATOR_UNIT = "operator"
# A certificate is renewed when less than this is left of it: time to hand it out.
RENEWAL = timedelta(days=30)
# Clocks of hospitals differ; a fresh certificate must not be "not yet valid" at one of them.
_CLOCK_SKEW = timedelta(minutes=5)

_ISSUE_ANEW = "move the file away and run `medfed certs issue` again"

# In the containers the gateways in front of the SuperLink answer with its certificate.
DEFAULT_SANS = ("localhost", "127.0.0.1", "::1", "superlink", "gateway", "operator")

_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def new_ca(
    key: ec.EllipticCurvePrivateKey,
    *,
    not_before: datetime | None = None,
    lifetime: timedelta = CA_LIFETIME,
) -> x509.Certificate:
    """A self-signed CA certificate that may sign certificates and nothing below them.

    Its name is its key's own: while two CAs are trusted, nobody takes one for the other.
    """
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest.hex()
    name = _name(f"medfed federation CA {digest[:8]}")
    builder = _builder(name, name, key.public_key(), not_before, lifetime)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage("key_cert_sign", "crl_sign"), critical=True)
    return builder.sign(key, hashes.SHA384())


def new_superlink_certificate(
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    sans: Iterable[str],
    *,
    not_before: datetime | None = None,
    lifetime: timedelta = SUPERLINK_LIFETIME,
) -> x509.Certificate:
    """A TLS server certificate for the names and addresses in ``sans``.

    Raises:
        CertsError: a name is neither a DNS name nor an IP address.
    """
    builder = _leaf(_name("medfed SuperLink"), key, ca, not_before, lifetime)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([general_name(san) for san in sans]), critical=False
    )
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    )
    return builder.sign(ca_key, hashes.SHA384())


def new_operator_certificate(
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    *,
    not_before: datetime | None = None,
    lifetime: timedelta = OPERATOR_LIFETIME,
) -> x509.Certificate:
    """A TLS client certificate of the operator's role."""
    builder = _leaf(_name("medfed operator", OPERATOR_UNIT), key, ca, not_before, lifetime)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
    )
    return builder.sign(ca_key, hashes.SHA384())


def _name(common: str, unit: str | None = None) -> x509.Name:
    units = [] if unit is None else [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)]
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "medfed"),
            *units,
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _leaf(
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    not_before: datetime | None,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    builder = _builder(name, ca.subject, key.public_key(), not_before, lifetime)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_key_usage("digital_signature"), critical=True)
    return builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
            ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        ),
        critical=False,
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    not_before: datetime | None,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    start = not_before or datetime.now(UTC) - _CLOCK_SKEW
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in allowed for usage in _KEY_USAGES})


def general_name(san: str) -> x509.GeneralName:
    """``san`` as a certificate carries it: an IP address, or a DNS name in ASCII.

    Raises:
        CertsError: it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(san))
    except ValueError:
        pass
    try:
        ascii_name = san.encode("idna").decode("ascii")
    except UnicodeError:
        ascii_name = ""
    labels = ascii_name.removeprefix("*.").split(".")
    if not all(
        label.replace("-", "a").replace("_", "a").isalnum()
        and not label.startswith("-")
        and not label.endswith("-")
        for label in labels
    ):
        raise CertsError(
            f"expected a DNS name or an IP address, found {san!r}",
            "for example --san superlink.example.org --san 192.0.2.7 (no https://, no port)",
        )
    return x509.DNSName(ascii_name)


def sans_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names and IP addresses that ``certificate`` is for; () if it names none."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in extension.value)


def certificate_to_pem(certificate: x509.Certificate) -> bytes:
    """PEM, as every TLS library reads it."""
    return certificate.public_bytes(Encoding.PEM)


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8 PEM without a passphrase: the SuperLink starts without anybody at a keyboard."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def bundle_to_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """PEM certificates one after the other: each of them is trusted."""
    return b"".join(certificate_to_pem(certificate) for certificate in certificates)


def bundle_from_pem(content: bytes, where: object) -> list[x509.Certificate]:
    """Read PEM certificates, of which there is one at least.

    Raises:
        CertsError: there is none.
    """
    return certificates.read(content, where, CertsError, _ISSUE_ANEW)


def certificate_from_pem(content: bytes, where: object) -> x509.Certificate:
    """Read a PEM certificate, the first if there are several.

    Raises:
        CertsError: it is none.
    """
    return bundle_from_pem(content, where)[0]


def key_from_pem(content: bytes, where: object) -> ec.EllipticCurvePrivateKey:
    """Read an elliptic-curve private key from PEM.

    Raises:
        CertsError: it is another kind of key, or none.
    """
    key = certificates.private_key(content, where, CertsError, _ISSUE_ANEW)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertsError(
            f"expected an elliptic-curve key in {where}, found {type(key).__name__}", _ISSUE_ANEW
        )
    return key
