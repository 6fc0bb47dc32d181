"""The PKI's folder: what is issued into it, and what is in it.

    ca.crt  ca.key                  the CA; while it is rotated ca.crt holds two, both trusted
    superlink.crt  superlink.key    the SuperLink's
    operator.crt  operator.key      the operator's, for a gateway that asks for one
    supernodes/NAME.key NAME.pub    the SuperNodes'; a hospital's own has no .key here
    revoked.json                    keys that never come back (``members``)

Issuing is idempotent. What is there and good stays, byte for byte; what is missing is made; a
certificate that lacks a name or soon expires is renewed, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from common import certificates
from common.errors import CertsError

from . import files, keys, members, pki

Kind = Literal["ca", "superlink", "operator", "supernode"]
Signer = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


@dataclass(frozen=True)
class Record:
    """One certificate or public key in the folder.

    Args:
        name: "ca", "superlink", "operator" or the SuperNode's name; "ca (old)" and "ca (next)"
            are those that are trusted besides while the CA is rotated.
        kind: which of the four it is.
        fingerprint: SHA-256; of a certificate as colon-separated hex (as ``openssl x509`` prints
            it), of a SuperNode's key as ``ssh-keygen -lf`` prints it.
        not_before: start of its validity, UTC; None for keys, which do not expire.
        not_after: end of its validity, UTC; None for keys.
        path: the certificate or public key.
        sans: the names and addresses that a SuperLink certificate is for.
    """

    name: str
    kind: Kind
    fingerprint: str
    not_before: datetime | None
    not_after: datetime | None
    path: Path
    sans: tuple[str, ...] = ()


@dataclass(frozen=True)
class Issued:
    """What one call of ``issue`` did.

    Args:
        actions: one line for each thing that was made or renewed; empty if nothing changed.
        records: what is in the folder now.
    """

    actions: tuple[str, ...]
    records: tuple[Record, ...]


def issue(folder: Path, names: Sequence[str], sans: Iterable[str] = ()) -> Issued:
    """Issue what is missing: a CA, the SuperLink's and the operator's certificate, key pairs.

    Args:
        folder: where to; made if missing.
        names: the SuperNodes; those that are revoked get nothing.
        sans: names and addresses of the SuperLink besides the defaults and those that its present
            certificate already has.

    Raises:
        CertsError: the folder is not writable, or something in it is not what it should be.
    """
    files.make_folder(folder)
    files.make_folder(folder / "supernodes")
    actions: list[str] = []
    signer = _ca(folder, actions)
    leaves(folder, signer, actions, sans=sans)
    gone = members.revoked_names(folder)
    for name in names:
        if name not in gone:
            _supernode(folder / "supernodes", name, actions)
    return Issued(actions=tuple(actions), records=tuple(inspect(folder)))


def leaves(
    folder: Path,
    signer: Signer,
    actions: list[str],
    *,
    sans: Iterable[str] = (),
    within: timedelta = pki.RENEWAL,
) -> None:
    """Make the SuperLink's and the operator's certificate, or renew them.

    Args:
        folder: the PKI's.
        signer: the CA that signs.
        actions: one line is added for each that was made or renewed.
        sans: as for ``issue``.
        within: renew what has less than this left.

    Raises:
        CertsError: a file is not what it should be, or cannot be written.
    """
    ca, ca_key = signer
    wanted = [str(pki.general_name(san).value) for san in (*pki.DEFAULT_SANS, *sans)]

    def superlink(
        key: ec.EllipticCurvePrivateKey, old: x509.Certificate | None
    ) -> x509.Certificate:
        names = dict.fromkeys((*(pki.sans_of(old) if old else ()), *wanted))
        return pki.new_superlink_certificate(key, ca, ca_key, names)

    def operator(key: ec.EllipticCurvePrivateKey, _: x509.Certificate | None) -> x509.Certificate:
        return pki.new_operator_certificate(key, ca, ca_key)

    _leaf(folder / "superlink", "the SuperLink's", ca, superlink, actions, wanted, within)
    _leaf(folder / "operator", "the operator's", ca, operator, actions, (), within)


def inspect(folder: Path) -> list[Record]:
    """What is in the folder: the CA, the certificates that it signed, SuperNodes' keys by name.

    Raises:
        CertsError: a file cannot be read or is not what its name says.
    """
    records: list[Record] = []
    kinds: tuple[Kind, Kind, Kind] = ("ca", "superlink", "operator")
    for kind in kinds:
        path = folder / f"{kind}.crt"
        if (content := files.read(path)) is None:
            continue
        for number, certificate in enumerate(pki.bundle_from_pem(content, path)):
            other = "next" if (folder / "next-ca.key").exists() else "old"
            records.append(
                Record(
                    name=kind if number == 0 else f"{kind} ({other})",
                    kind=kind,
                    fingerprint=certificate.fingerprint(hashes.SHA256()).hex(":").upper(),
                    not_before=certificate.not_valid_before_utc,
                    not_after=certificate.not_valid_after_utc,
                    path=path,
                    sans=pki.sans_of(certificate),
                )
            )
    for path in sorted((folder / "supernodes").glob("*.pub")):
        public = keys.public_from_openssh(files.read(path) or b"", path)
        records.append(
            Record(
                name=path.stem,
                kind="supernode",
                fingerprint=keys.fingerprint(public),
                not_before=None,
                not_after=None,
                path=path,
            )
        )
    return records


def signer(folder: Path) -> tuple[Signer, list[x509.Certificate]]:
    """The CA that signs, and all CAs that are trusted, the signing one among them.

    Raises:
        CertsError: the CA is not there, or a file is not what its name says.
    """
    certificate_path, key_path = folder / "ca.crt", folder / "ca.key"
    certificate_pem, key_pem = files.read(certificate_path), files.read_private(key_path)
    if certificate_pem is None:
        raise CertsError(
            f"expected the CA's certificate at {certificate_path}, found no such file",
            "`medfed certs issue` makes a CA",
        )
    if key_pem is None:
        raise CertsError(
            f"expected the CA's key at {key_path}, found only its certificate",
            "bring ca.key here from where it is kept; to start over with a new CA, which every "
            "SuperNode must then be given, move the whole folder away",
        )
    key = pki.key_from_pem(key_pem, key_path)
    trusted = pki.bundle_from_pem(certificate_pem, certificate_path)
    for certificate in trusted:
        if certificates.is_pair(certificate, key):
            return (certificate, key), trusted
    raise _no_pair(certificate_path, key_path)


def _ca(folder: Path, actions: list[str]) -> Signer:
    certificate_path, key_path = folder / "ca.crt", folder / "ca.key"
    if not certificate_path.exists():
        # A key without certificate: an earlier call was interrupted, nobody has seen either.
        key_pem = files.read_private(key_path)
        key = pki.new_key() if key_pem is None else pki.key_from_pem(key_pem, key_path)
        certificate = pki.new_ca(key)
        files.write(key_path, pki.key_to_pem(key), files.PRIVATE)
        files.write(certificate_path, pki.certificate_to_pem(certificate), files.PUBLIC)
        actions.append(f"made the CA, valid until {certificate.not_valid_after_utc:%Y-%m-%d}")
        return certificate, key
    (certificate, key), _ = signer(folder)
    if datetime.now(UTC) >= certificate.not_valid_after_utc - pki.RENEWAL:
        raise CertsError(
            f"expected the CA to be valid for {pki.RENEWAL.days} days more, found that it ends on "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}",
            "`medfed certs rotate-ca begin` makes the next one; docs/certificates.md says how",
        )
    return certificate, key


def _leaf(
    stem: Path,
    whose: str,
    ca: x509.Certificate,
    make: Callable[[ec.EllipticCurvePrivateKey, x509.Certificate | None], x509.Certificate],
    actions: list[str],
    wanted: Sequence[str],
    within: timedelta,
) -> None:
    """Make one certificate and its key, or renew it and keep the key."""
    certificate_path, key_path = stem.with_suffix(".crt"), stem.with_suffix(".key")
    certificate_pem, key_pem = files.read(certificate_path), files.read_private(key_path)
    key = None if key_pem is None else pki.key_from_pem(key_pem, key_path)
    certificate = None
    reason = f"made {whose} certificate"
    if certificate_pem is not None and key is not None:
        certificate = pki.certificate_from_pem(certificate_pem, certificate_path)
        if not certificates.is_pair(certificate, key):
            raise _no_pair(certificate_path, key_path)
        missing = [san for san in wanted if san not in pki.sans_of(certificate)]
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        if not certificates.is_issued_by(certificate, ca):
            reason = f"renewed {whose} certificate (it was another CA's)"
        elif missing:
            reason = f"renewed {whose} certificate (added {', '.join(missing)})"
        elif left < within:
            reason = f"renewed {whose} certificate (it " + (
                "had expired)" if left.total_seconds() < 0 else f"had {left.days} days left)"
            )
        else:
            return
    if key is None:
        key = pki.new_key()
        files.write(key_path, pki.key_to_pem(key), files.PRIVATE)
    fresh = make(key, certificate)
    files.write(certificate_path, pki.certificate_to_pem(fresh), files.PUBLIC)
    actions.append(f"{reason}, valid until {fresh.not_valid_after_utc:%Y-%m-%d}")


def _supernode(folder: Path, name: str, actions: list[str]) -> None:
    files.check_name(name)
    key_path, public_path = folder / f"{name}.key", folder / f"{name}.pub"
    private, public = files.read_private(key_path), files.read(public_path)
    if private is None and public is not None:
        # The hospital made its own key pair and keeps the private half: as it should be.
        keys.public_from_openssh(public, public_path)
        return
    if private is None:
        key = pki.new_key()
        files.write(key_path, keys.private_to_openssh(key), files.PRIVATE)
        actions.append(f"made the key pair of {name}")
    else:
        key = keys.private_from_openssh(private, key_path)
    if public is None:
        files.write(public_path, keys.public_to_openssh(key.public_key(), name), files.PUBLIC)
        if private is not None:
            actions.append(f"wrote the public key of {name} again")
    elif keys.public_from_openssh(public, public_path) != key.public_key():
        raise CertsError(
            f"expected {public_path} to be the public half of {key_path}, found another key",
            "put the matching file back, or move both away and issue again",
        )


def _no_pair(certificate_path: Path, key_path: Path) -> CertsError:
    return CertsError(
        f"expected {key_path} to be the private key of {certificate_path}, "
        "found that it is another's",
        "put the matching file back, or move both away and issue again",
    )
