"""Institutions that come and go: by the public key that each made itself, and never by that again.

``revoked.json`` remembers every revoked key. Such a key is never taken again, under any name; the
name may come back with another key, when somebody says so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common.errors import CertsError

from . import files, keys

FILE_NAME = "revoked.json"


@dataclass(frozen=True)
class Revocation:
    """A key that is not taken any more.

    Args:
        name: the institution's.
        fingerprint: of its key, as ``ssh-keygen -lf`` prints it.
        public_key: PEM (SubjectPublicKeyInfo), as the SuperLink knows it.
        at: when, ISO 8601, UTC.
        reason: why; may be empty.
    """

    name: str
    fingerprint: str
    public_key: str
    at: str
    reason: str


def revocations(folder: Path) -> list[Revocation]:
    """All that were ever revoked, oldest first.

    Raises:
        CertsError: the list is damaged.
    """
    path = folder / FILE_NAME
    content = files.read(path)
    if content is None:
        return []
    try:
        return [Revocation(**entry) for entry in json.loads(content)]
    except (ValueError, TypeError):
        raise CertsError(
            f"expected the list of revoked keys in {path}, found something else",
            "put the file back from a backup: without it revoked institutions could return",
        ) from None


def revoked_names(folder: Path) -> set[str]:
    """Institutions that are out: revoked, and not enrolled again with another key.

    Raises:
        CertsError: the list or a public key is damaged.
    """
    known = revocations(folder)
    prints = {one.fingerprint for one in known}
    return {one.name for one in known if _fingerprint_of(folder, one.name) in {None, *prints}}


def revoke(folder: Path, name: str, reason: str = "") -> Revocation:
    """Put an institution's key on the list and forget it here. Again: changes nothing.

    Raises:
        CertsError: there is no such institution, or the folder cannot be written.
    """
    files.check_name(name)
    known = revocations(folder)
    path = _public_path(folder, name)
    content = files.read(path)
    if content is None:
        for one in reversed(known):
            if one.name == name:
                return one
        raise CertsError(
            f"expected the public key of {name} at {path}, found no such file",
            "`medfed certs show` lists the institutions",
        )
    key = keys.public_from_openssh(content, path)
    made = Revocation(
        name=name,
        fingerprint=keys.fingerprint(key),
        public_key=_pem(key),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        reason=reason,
    )
    before = next((one for one in known if one.fingerprint == made.fingerprint), None)
    if before is None:
        # On the list first: whatever interrupts the rest, the key is out.
        content = json.dumps([asdict(one) for one in (*known, made)], indent=2).encode()
        files.write(folder / FILE_NAME, content, files.PUBLIC)
    path.unlink()
    path.with_suffix(".key").unlink(missing_ok=True)
    return before or made


def enrol(folder: Path, name: str, public_key: Path, readmit: bool = False) -> str:
    """Take the public key that an institution made itself; the key's fingerprint.

    Args:
        folder: the PKI's.
        name: the institution's.
        public_key: the ``.pub`` file that it sent.
        readmit: let a revoked name come back, with another key.

    Raises:
        CertsError: it is no such key, a revoked one, another institution's, or the name is taken.
    """
    files.check_name(name)
    content = files.read(public_key)
    if content is None:
        raise CertsError(
            f"expected a public key at {public_key}, found no such file",
            "the institution makes one: ssh-keygen -t ecdsa -b 384",
        )
    if b"PRIVATE KEY" in content:
        raise CertsError(
            f"expected a public key in {public_key}, found a private one",
            "it must never have left the institution: ask for a new pair's .pub file",
        )
    key = keys.public_from_openssh(content, public_key)
    fingerprint = keys.fingerprint(key)
    known = revocations(folder)
    for one in known:
        if one.fingerprint == fingerprint:
            raise CertsError(
                f"expected a key of {name} that was never revoked, found one that was, "
                f"of {one.name} on {one.at[:10]}",
                "a revoked key does not come back: the institution makes a new pair",
            )
    if any(one.name == name for one in known) and not readmit:
        raise CertsError(
            f"expected {name} not to be revoked, found that it is",
            "--readmit, if it may come back with this new key",
        )
    for path in sorted((folder / "supernodes").glob("*.pub")):
        same = _fingerprint_of(folder, path.stem) == fingerprint
        if path.stem == name and not same:
            raise CertsError(
                f"expected no other key of {name}, found one in {path}",
                f"`medfed certs revoke {name}` first, then enrol the new key with --readmit",
            )
        if path.stem != name and same:
            raise CertsError(
                f"expected a key that is the own one of {name}, found the key of {path.stem}",
                "one key, one institution: each makes its own",
            )
    files.make_folder(folder)
    files.make_folder(folder / "supernodes")
    files.write(_public_path(folder, name), keys.public_to_openssh(key, name), files.PUBLIC)
    return fingerprint


def _public_path(folder: Path, name: str) -> Path:
    return folder / "supernodes" / f"{name}.pub"


def _fingerprint_of(folder: Path, name: str) -> str | None:
    path = _public_path(folder, name)
    content = files.read(path)
    return None if content is None else keys.fingerprint(keys.public_from_openssh(content, path))


def _pem(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")
