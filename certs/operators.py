"""Certificates of operators who reach the SuperLink from another machine.

    operators/NAME.crt  operators/NAME.key

The gateway's remote listener takes nobody without one (superlink/gateway/conf/operator.conf).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from . import files, pki
from .errors import CertsError

# What stands in the gateway's log, and what its configuration can take apart.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")


def issue(folder: Path, name: str) -> Path:
    """Make or renew an operator's certificate; where it is.

    One that is good for long enough stays as it is, byte for byte; a renewed one has a new key.

    Args:
        folder: the PKI's folder; it holds the CA.
        name: who the operator is.

    Raises:
        CertsError: the name cannot be a certificate's, there is no CA here, or the folder cannot be
            written.
    """
    if not _NAME.fullmatch(name):
        raise CertsError(
            f"expected an operator's name of letters, digits and '._@-', found {name!r}",
            "for example medfed certs operator alice@example.org",
        )
    ca_pem, ca_key_pem = files.read(folder / "ca.crt"), files.read_private(folder / "ca.key")
    if ca_pem is None or ca_key_pem is None:
        raise CertsError(
            f"expected the CA in {folder}, found no ca.crt with its ca.key",
            "`medfed certs issue` makes one; operators are let in where the CA is kept",
        )
    ca = pki.certificate_from_pem(ca_pem, folder / "ca.crt")
    place = folder / "operators" / f"{name}.crt"
    if (present := files.read(place)) is not None:
        certificate = pki.certificate_from_pem(present, place)
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        if left > pki.RENEWAL and pki.is_issued_by(certificate, ca):
            return place
    files.make_folder(place.parent)
    key = pki.new_key()
    ca_key = pki.key_from_pem(ca_key_pem, folder / "ca.key")
    certificate = pki.new_operator_certificate(key, ca, ca_key, name)
    files.write(place.with_suffix(".key"), pki.key_to_pem(key), files.PRIVATE)
    files.write(place, pki.certificate_to_pem(certificate), files.PUBLIC)
    return place
