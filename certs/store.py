"""The PKI's folder: what is issued into it, and what is in it.

    ca.crt  ca.key  superlink.crt  superlink.key  supernodes/NAME.key  supernodes/NAME.pub

Issuing is idempotent. What is there and good stays, byte for byte; what is missing is made; a
SuperLink certificate that lacks a name or soon expires is renewed, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from . import files, keys, pki
from .errors import CertsError

Kind = Literal["ca", "superlink", "supernode"]


@dataclass(frozen=True)
class Record:
    """One certificate or public key in the folder.

    Args:
        name: "ca", "superlink" or the SuperNode's name.
        kind: which of the three it is.
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
    """Issue what is missing: a CA, the SuperLink's certificate, a key pair for each name.

    Args:
        folder: where to; made if missing.
        names: the SuperNodes.
        sans: names and addresses of the SuperLink besides the defaults and those that its present
            certificate already has.

    Raises:
        CertsError: the folder is not writable, or something in it is not what it should be.
    """
    files.make_folder(folder)
    files.make_folder(folder / "supernodes")
    actions: list[str] = []
    ca, ca_key = _ca(folder, actions)
    _superlink(folder, ca, ca_key, sans, actions)
    for name in names:
        _supernode(folder / "supernodes", name, actions)
    return Issued(actions=tuple(actions), records=tuple(inspect(folder)))


def inspect(folder: Path) -> list[Record]:
    """What is in the folder: the CA, the SuperLink's certificate, SuperNodes' keys by name.

    Raises:
        CertsError: a file cannot be read or is not what its name says.
    """
    records: list[Record] = []
    kinds: tuple[Kind, Kind] = ("ca", "superlink")
    for kind in kinds:
        path = folder / f"{kind}.crt"
        if (content := files.read(path)) is not None:
            certificate = pki.certificate_from_pem(content, path)
            records.append(
                Record(
                    name=kind,
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


def _ca(folder: Path, actions: list[str]) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = folder / "ca.crt", folder / "ca.key"
    certificate_pem, key_pem = files.read(certificate_path), files.read_private(key_path)
    if certificate_pem is None and key_pem is None:
        key = pki.new_key()
        certificate = pki.new_ca(key)
        files.write(key_path, pki.key_to_pem(key), files.PRIVATE)
        files.write(certificate_path, pki.certificate_to_pem(certificate), files.PUBLIC)
        actions.append(f"made the CA, valid until {certificate.not_valid_after_utc:%Y-%m-%d}")
        return certificate, key
    if key_pem is None:
        raise CertsError(
            f"expected the CA's key at {key_path}, found only its certificate",
            "bring ca.key here from where it is kept; to start over with a new CA, which every "
            "SuperNode must then be given, move the whole folder away",
        )
    key = pki.key_from_pem(key_pem, key_path)
    if certificate_pem is None:
        # An earlier call was interrupted between its two files; nobody has seen a certificate.
        certificate = pki.new_ca(key)
        files.write(certificate_path, pki.certificate_to_pem(certificate), files.PUBLIC)
        actions.append(f"made the CA, valid until {certificate.not_valid_after_utc:%Y-%m-%d}")
        return certificate, key
    certificate = pki.certificate_from_pem(certificate_pem, certificate_path)
    _check_pair(certificate, key, certificate_path, key_path)
    if datetime.now(UTC) >= certificate.not_valid_after_utc - pki.RENEWAL:
        raise CertsError(
            f"expected the CA to be valid for {pki.RENEWAL.days} days more, found that it ends on "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}",
            "every SuperNode must be given a new CA: move the folder away, issue again, hand out "
            "ca.crt",
        )
    return certificate, key


def _superlink(
    folder: Path,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    sans: Iterable[str],
    actions: list[str],
) -> None:
    certificate_path, key_path = folder / "superlink.crt", folder / "superlink.key"
    wanted = [str(pki.general_name(san).value) for san in (*pki.DEFAULT_SANS, *sans)]
    certificate_pem, key_pem = files.read(certificate_path), files.read_private(key_path)
    key = None if key_pem is None else pki.key_from_pem(key_pem, key_path)
    reason = "made the SuperLink's certificate"
    if certificate_pem is not None and key is not None:
        certificate = pki.certificate_from_pem(certificate_pem, certificate_path)
        _check_pair(certificate, key, certificate_path, key_path)
        present = pki.sans_of(certificate)
        missing = [san for san in wanted if san not in present]
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        wanted = [*present, *missing]
        if not pki.is_issued_by(certificate, ca):
            reason = "renewed the SuperLink's certificate (it was another CA's)"
        elif missing:
            reason = f"renewed the SuperLink's certificate (added {', '.join(missing)})"
        elif left < pki.RENEWAL:
            reason = "renewed the SuperLink's certificate (it " + (
                "had expired)" if left.total_seconds() < 0 else f"had {left.days} days left)"
            )
        else:
            return
    if key is None:
        key = pki.new_key()
        files.write(key_path, pki.key_to_pem(key), files.PRIVATE)
    certificate = pki.new_superlink_certificate(key, ca, ca_key, dict.fromkeys(wanted))
    files.write(certificate_path, pki.certificate_to_pem(certificate), files.PUBLIC)
    actions.append(f"{reason}, valid until {certificate.not_valid_after_utc:%Y-%m-%d}")


def _supernode(folder: Path, name: str, actions: list[str]) -> None:
    if not name or not name.isascii() or name in {".", ".."} or set(name) & set("/\\ \t\r\n"):
        raise CertsError(
            f"expected a SuperNode's name that can be a file's, found {name!r}",
            "letters, digits and '-', for example supernode-07",
        )
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


def _check_pair(
    certificate: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    certificate_path: Path,
    key_path: Path,
) -> None:
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if certificate.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        raise CertsError(
            f"expected {key_path} to be the private key of {certificate_path}, "
            "found that it is another's",
            "put the matching file back, or move both away and issue again",
        )
