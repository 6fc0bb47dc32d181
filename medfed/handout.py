"""What each container is given: its own files, copied into a volume that only it mounts.

Compose cannot mount one folder of a volume, and its file secrets keep the owner they have on the
host. So there is a volume for each SuperNode, one for the SuperLink and one for what is public,
and the provision service, which has everything, lays in each what its owner may see.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common import files
from common.errors import MedfedError
from medfed.paths import Home

_PRIVATE, _PUBLIC = 0o600, 0o644


class HandOutError(MedfedError):
    """Something that should be handed out is not there."""


@dataclass(frozen=True)
class Volumes:
    """Where the volumes are mounted while they are filled.

    Args:
        sites: a folder with one mounted volume for each SuperNode, by its name.
        superlink: the SuperLink's volume.
        public: the volume with what anyone may see.
    """

    sites: Path
    superlink: Path
    public: Path


def hand_out(home: Home, names: Iterable[str], volumes: Volumes) -> int:
    """Lay in each volume what its owner gets; what is there already stays as it is.

    A SuperNode gets its key pair, the CA's certificate, its partition (``data/``). The SuperLink
    gets its certificate, that certificate's key and the CA's certificate. Public are the CA's
    certificate, the public keys of these SuperNodes and no others, and the list of revoked ones.
    The CA's key goes nowhere. An institution whose private key is not here gets nothing.

    Returns:
        How many files were written or replaced.

    Raises:
        HandOutError: a key, a certificate or a partition is missing.
    """
    ca = home.certs / "ca.crt"
    names = tuple(names)
    for stale in (volumes.public / "supernodes").glob("*.pub"):
        if stale.stem not in names:
            stale.unlink()  # the gateway lets in whose key lies here
    written = _lay(ca, volumes.public / "ca.crt", _PUBLIC)
    written += _lay(ca, volumes.superlink / "ca.crt", _PUBLIC)
    written += _lay(home.certs / "superlink.crt", volumes.superlink / "superlink.crt", _PUBLIC)
    written += _lay(home.certs / "superlink.key", volumes.superlink / "superlink.key", _PRIVATE)
    if (revoked := home.certs / "revoked.json").exists():
        written += _lay(revoked, volumes.public / "revoked.json", _PUBLIC)
    for name in names:
        site, keys = volumes.sites / name, home.certs / "supernodes"
        written += _lay(
            keys / f"{name}.pub", volumes.public / "supernodes" / f"{name}.pub", _PUBLIC
        )
        if not (keys / f"{name}.key").exists():
            continue  # an institution that made its own pair runs its SuperNode itself
        written += _lay(ca, site / "ca.crt", _PUBLIC)
        written += _lay(keys / f"{name}.key", site / f"{name}.key", _PRIVATE)
        written += _lay(keys / f"{name}.pub", site / f"{name}.pub", _PUBLIC)
        written += _partition(home.partitions / name, site / "data")
    return written


def _partition(source: Path, target: Path) -> int:
    """Make ``target`` hold the files of ``source`` and no others."""
    rows = sorted(path for path in source.glob("*") if path.is_file()) if source.is_dir() else []
    if not rows:
        raise HandOutError(
            f"expected a partition in {source}, found none", "`medfed prepare` makes the partitions"
        )
    kept = {path.name for path in rows}
    for stale in target.glob("*") if target.is_dir() else ():
        if stale.name not in kept:
            stale.unlink()
    return sum(_lay(path, target / path.name, _PUBLIC) for path in rows)


def _lay(source: Path, target: Path, mode: int) -> int:
    """Copy one file whole or not at all; 0 if it was there already, else 1."""
    try:
        content = source.read_bytes()
    except FileNotFoundError:
        raise HandOutError(
            f"expected {source}, found no such file", "`medfed certs issue` makes the certificates"
        ) from None
    if target.is_file() and target.read_bytes() == content:
        return 0
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    files.write(target, content, mode)
    return 1
