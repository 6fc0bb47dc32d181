"""What can be known to be wrong before the SuperLink starts."""

from __future__ import annotations

import errno
import os
import socket
import sqlite3
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from common import certificates, files
from common.errors import SuperLinkError

from .command import Settings

_ROOM = 4 * 2**20  # bytes; a few rounds' worth of state
_ISSUE = "`medfed certs issue` makes a CA and a certificate that belong together"


def check(settings: Settings) -> None:
    """Check certificate, key, CA, database folder and port.

    Raises:
        SuperLinkError: the first thing that is wrong.
    """
    check_certificates(settings.certificate, settings.key, settings.ca)
    check_database(settings.database)
    check_port_is_free(settings.host, settings.port)


def check_certificates(certificate: Path, key: Path, ca: Path) -> None:
    """Check that the key is the certificate's, the certificate the CA's, and the dates good.

    Raises:
        SuperLinkError: a file is missing, malformed, open to others, expired, or of another pair.
    """
    served, *_ = certificates.read(_read(certificate), certificate, SuperLinkError, _ISSUE)
    trusted = certificates.read(_read(ca), ca, SuperLinkError, _ISSUE)
    private = certificates.private_key(_read(key), key, SuperLinkError, _ISSUE)
    files.check_private(key, SuperLinkError, f"chmod 600 {key}")
    if not certificates.is_pair(served, private):
        raise SuperLinkError(
            f"expected {key} to be the private key of {certificate}, found that it is another's",
            _ISSUE,
        )
    # Two are trusted while the CA is rotated.
    issuer = next((one for one in trusted if certificates.is_issued_by(served, one)), None)
    if issuer is None:
        raise SuperLinkError(
            f"expected {certificate} to be issued by the CA in {ca}, found another issuer "
            f"({served.issuer.rfc4514_string()})",
            _ISSUE,
        )
    now = datetime.now(UTC)
    for path, one in ((certificate, served), (ca, issuer)):
        if now > one.not_valid_after_utc:
            raise SuperLinkError(
                f"expected {path} to be valid, found that it expired on "
                f"{one.not_valid_after_utc:%Y-%m-%d}",
                "`medfed certs renew` renews what has expired",
            )
        if now < one.not_valid_before_utc:
            raise SuperLinkError(
                f"expected {path} to be valid, found that it starts on "
                f"{one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
                "is this machine's clock right?",
            )


def _read(path: Path) -> bytes:
    content = files.read(path, SuperLinkError)
    if content is None:
        raise SuperLinkError(f"expected {path}, found no such file", _ISSUE)
    return content


def check_database(database: Path) -> None:
    """Check that SQLite will be able to write ``database``, and that what is in it is sound.

    Reads only, but for a file of its own that it removes again.

    Raises:
        SuperLinkError: the folder is missing, it or the file cannot be written, the volume is full
            or read-only, or the database is damaged.
    """
    if not database.parent.is_dir():
        raise SuperLinkError(
            f"expected the folder of the database {database}, found no such folder",
            f"mkdir -p {database.parent}",
        )
    for path in (database.parent, database):
        if path.exists() and not os.access(path, os.W_OK):
            raise SuperLinkError(
                f"expected to write {path}, found that it cannot be written",
                "it must be on a volume that is not read-only, and writable by the user that runs "
                f"the SuperLink (uid {os.getuid()})",
            )
    _check_room(database.parent)
    if database.exists():
        _check_is_sound(database)


def _check_room(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(_ROOM))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise SuperLinkError(
            f"expected to write {_ROOM // 2**20} MB in {folder}, found: {error.strerror}",
            "make room on that volume; the database and the finished rounds in runs/ are as they "
            "were, and unfinished runs go on when the SuperLink starts again",
        ) from None


def _check_is_sound(database: Path) -> None:
    try:
        # Read-only, so that nothing is repaired, moved or overwritten by looking at it.
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as opened:
            (found,) = opened.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise SuperLinkError(
            f"expected a sound database in {database}, found it damaged: {found.splitlines()[-1]}",
            f"nothing was changed. Move {database.name}* away and start again: SuperNodes are then "
            "registered anew, and each run's last good round is still in runs/",
        )


def check_port_is_free(host: str, port: int) -> None:
    """Check that the SuperLink will be able to listen.

    Raises:
        SuperLinkError: something listens there, or the address is not this machine's.
    """
    if not 0 < port < 65536:
        raise SuperLinkError(f"expected a port from 1 to 65535, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SuperLinkError(
                f"expected port {port} to be free for the SuperLink, "
                f"found it in use{_owner_of(port)}",
                "stop what listens there, or choose another port: --port",
            ) from None
        raise SuperLinkError(
            f"expected to listen on {host} port {port}, found: {error.strerror}",
            "--host takes an address of this machine, or 0.0.0.0 for all of them",
        ) from None


def _owner_of(port: int) -> str:
    """`` by NAME (pid N)`` where this user may see it, else nothing."""
    import psutil

    try:
        connections = psutil.net_connections(kind="tcp")
        for connection in connections:
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
                if connection.pid is None:
                    break
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass
    return ""
