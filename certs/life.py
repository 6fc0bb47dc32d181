"""Certificates over time: renewal, a new CA with an overlap, and what will expire.

A CA is rotated in three steps, with a hand-out between them, so that at no moment anybody is shown
a certificate of a CA that they do not trust yet:

    begin     a second CA is made; ca.crt holds both, to be handed out to everybody
    switch    the new CA signs the certificates; the old CA's key is gone
    finish    ca.crt holds the new CA alone, to be handed out again
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from common import certificates
from common.errors import CertsError

from . import files, pki
from .store import Record, inspect, leaves, signer

_NEXT = "next-ca.key"


def renew(folder: Path, within: timedelta = pki.RENEWAL) -> list[str]:
    """Renew the SuperLink's and the operator's certificate where less than ``within`` is left.

    Keys, names and the CA stay. One line for each that was renewed.

    Raises:
        CertsError: the folder has no CA, or something in it is not what it should be.
    """
    actions: list[str] = []
    ours, _ = signer(folder)
    leaves(folder, ours, actions, within=within)
    return actions


def expiring(folder: Path, within: timedelta) -> list[Record]:
    """What expires within ``within``, or has expired.

    Raises:
        CertsError: a file cannot be read or is not what its name says.
    """
    end = datetime.now(UTC) + within
    return [one for one in inspect(folder) if one.not_after is not None and one.not_after < end]


def begin_rotation(folder: Path) -> x509.Certificate:
    """Make the next CA and trust it beside the present one, which goes on signing.

    Raises:
        CertsError: a rotation is under way, or the folder is not as it should be.
    """
    (ca, _), trusted = signer(folder)
    if len(trusted) > 1:
        raise CertsError(
            f"expected one CA in {folder / 'ca.crt'}, found a rotation under way",
            "`medfed certs rotate-ca switch`, or `finish`, is the next step",
        )
    path = folder / _NEXT
    # Interrupted after the key was written: nobody has seen its certificate.
    pem = files.read_private(path)
    key = pki.new_key() if pem is None else pki.key_from_pem(pem, path)
    files.write(path, pki.key_to_pem(key), files.PRIVATE)
    fresh = pki.new_ca(key)
    files.write(folder / "ca.crt", pki.bundle_to_pem([ca, fresh]), files.PUBLIC)
    return fresh


def switch_rotation(folder: Path) -> list[str]:
    """Let the next CA sign from now on; the old one is trusted still, and its key is gone.

    Raises:
        CertsError: no rotation was begun, or the folder is not as it should be.
    """
    _, trusted = signer(folder)
    if len(trusted) == 1:
        raise _not_begun(folder)
    if (folder / _NEXT).exists():
        key = pki.key_from_pem(files.read_private(folder / _NEXT) or b"", folder / _NEXT)
        if not any(certificates.is_pair(certificate, key) for certificate in trusted):
            raise CertsError(
                f"expected {folder / _NEXT} to belong to a CA in {folder / 'ca.crt'}, "
                "found that it does not",
                "put the matching file back",
            )
        (folder / _NEXT).replace(folder / "ca.key")
    ours, trusted = signer(folder)
    # Tools that read one certificate of a file read the first.
    ordered = [ours[0], *(other for other in trusted if other != ours[0])]
    files.write(folder / "ca.crt", pki.bundle_to_pem(ordered), files.PUBLIC)
    actions: list[str] = []
    leaves(folder, ours, actions)
    return actions


def finish_rotation(folder: Path) -> x509.Certificate:
    """Trust the new CA alone.

    Raises:
        CertsError: there is nothing to finish, or the switch has not been made.
    """
    (ca, _), trusted = signer(folder)
    if len(trusted) == 1:
        raise _not_begun(folder)
    if (folder / _NEXT).exists():
        raise CertsError(
            "expected the next CA to sign already, found that the old one does",
            "`medfed certs rotate-ca switch` first, once everybody has the new ca.crt",
        )
    files.write(folder / "ca.crt", pki.certificate_to_pem(ca), files.PUBLIC)
    return ca


def _not_begun(folder: Path) -> CertsError:
    return CertsError(
        f"expected a rotation to be under way in {folder}, found one CA",
        "`medfed certs rotate-ca begin` is the first step",
    )
