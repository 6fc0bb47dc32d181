"""What can be known to be wrong before a SuperNode starts."""

from __future__ import annotations

import csv
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common import files, keys
from common.errors import SuperNodeError

from .command import Settings, node_config

_ROW_FILES = (".jsonl", ".csv", ".parquet")
_CONNECT_TIMEOUT_S = 5.0
_RETRY_S = 2.0
_REMIND_S = 30.0

# Verification results of OpenSSL (X509_V_ERR_…) that a person would mend in different ways.
_EXPIRED, _NOT_YET_VALID, _WRONG_NAME, _WRONG_ADDRESS = 10, 9, 62, 64


def check(settings: Settings) -> None:
    """Check all that is on this machine: key, CA, partition, runtime port.

    Raises:
        SuperNodeError: the first thing that is wrong.
    """
    check_key(settings.name, settings.key, settings.public_keys)
    trust(settings.ca)
    check_partition_folder(settings.data)
    node_config(settings)
    check_port_is_free(settings.runtime_port)


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a SuperNode's private key (OpenSSH format, elliptic curve).

    Raises:
        SuperNodeError: it is missing, not readable, open to others, or of another kind.
    """
    content = files.read(path, SuperNodeError)
    if content is None:
        raise SuperNodeError(
            f"expected this SuperNode's private key at {path}, found no such file",
            "`medfed certs issue` makes one; a hospital makes its own or is sent one",
        )
    files.check_private(path, SuperNodeError, f"chmod 600 {path}")
    hint = "`medfed certs issue` writes the form that Flower takes"
    return keys.private_key(content, path, SuperNodeError, hint)


def check_key(name: str, key: Path, public_keys: Path) -> None:
    """Check that ``key`` is the private half of ``public_keys/NAME.pub``.

    Raises:
        SuperNodeError: it is not; if it is another SuperNode's, the message says whose.
    """
    public = _public_bytes(read_key(key).public_key())
    own = public_keys / f"{name}.pub"
    expected = _read_public(own)
    if expected is None:
        raise SuperNodeError(
            f"expected the public key of {name} at {own}, found none that can be read",
            "it is the one that was registered at the SuperLink; see --public-keys",
        )
    if public == expected:
        return
    for other in sorted(public_keys.glob("*.pub")):
        if _read_public(other) == public:
            raise SuperNodeError(
                f"expected the key of {name} in {key}, found the key of {other.stem}",
                f"give {name} its own key file: one key, one SuperNode",
            )
    raise SuperNodeError(
        f"expected the key of {name} in {key}, found one that does not belong to {own.name}",
        "either the key or the .pub file was replaced: put the matching pair back",
    )


def _read_public(path: Path) -> bytes | None:
    try:
        return _public_bytes(keys.public_key(path.read_bytes(), path, SuperNodeError, ""))
    except (OSError, SuperNodeError):
        return None


def _public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def trust(ca: Path) -> ssl.SSLContext:
    """A TLS context that trusts ``ca`` and nothing else.

    Raises:
        SuperNodeError: the file is missing or is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=str(ca))
    except FileNotFoundError:
        raise SuperNodeError(
            f"expected the federation's CA certificate at {ca}, found no such file",
            "the coordinator hands it out: ca.crt",
        ) from None
    except (ssl.SSLError, OSError) as error:
        raise SuperNodeError(
            f"expected a PEM certificate in {ca}, found: {error.strerror or error}",
            "the coordinator hands it out: ca.crt",
        ) from None
    return context


def check_partition_folder(folder: Path) -> None:
    """Check that ``folder`` has a file with at least one row in it.

    Raises:
        SuperNodeError: no folder, no file of a known kind, or only empty ones.
    """
    if not folder.is_dir():
        raise SuperNodeError(
            f"expected the partition's folder at {folder}, found no such folder",
            "`medfed prepare` makes the partitions; a hospital mounts its own data here",
        )
    try:
        files = [path for path in sorted(folder.iterdir()) if path.suffix in _ROW_FILES]
        if any(_has_row(path) for path in files):
            return
    except OSError as error:
        raise SuperNodeError(
            f"expected to read the partition in {folder}, found: {error.strerror} "
            f"({error.filename})",
            f"it must be readable by the user that runs the SuperNode (uid {os.getuid()})",
        ) from None
    found = ", ".join(path.name for path in files)
    raise SuperNodeError(
        f"expected rows in {folder} (*.jsonl, *.csv or *.parquet), "
        + (f"found only empty files: {found}" if files else "found no such file"),
        "`medfed data check FOLDER` says what it can read there",
    )


def _has_row(path: Path) -> bool:
    if path.suffix == ".parquet":
        from pyarrow import ArrowInvalid, parquet  # type: ignore[import-untyped]

        try:
            return int(parquet.read_metadata(path).num_rows) > 0
        except ArrowInvalid as error:
            raise SuperNodeError(
                f"expected a Parquet file in {path}, found: {error}", "write it again, or remove it"
            ) from None
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        if path.suffix == ".csv":
            rows = csv.reader(lines)
            return next(rows, None) is not None and next(rows, None) is not None
        return any(line.strip() for line in lines)


def check_port_is_free(port: int) -> None:
    """Check that this SuperNode's ClientApps will be able to reach it.

    Raises:
        SuperNodeError: something else listens on ``port``.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SuperNodeError(
                f"expected port {port} to be free for this SuperNode's ClientApps, "
                f"found: {error.strerror}",
                "give each SuperNode of a machine a port of its own: --runtime-port",
            ) from None


def wait_for_superlink(
    settings: Settings,
    *,
    say: Callable[[str], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once the SuperLink answers over TLS and is who it should be.

    A SuperLink that is down is waited for, and that is said; hospitals start before coordinators.

    Raises:
        SuperNodeError: something answers that is not the SuperLink of this CA and host name.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    context = trust(settings.ca)
    said, said_at = "", 0.0
    while (reason := _handshake(settings, context)) is not None:
        now = time.monotonic()
        if reason != said or now - said_at >= _REMIND_S:
            say(f"{settings.name}: waiting for the SuperLink at {settings.superlink} ({reason})")
            said, said_at = reason, now
        sleep(_RETRY_S)


def _handshake(settings: Settings, context: ssl.SSLContext) -> str | None:
    """One attempt: None when all is well, else why the SuperLink could not be reached."""
    host, port = settings.superlink_host, settings.superlink_port
    try:
        with (
            socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S) as raw,
            context.wrap_socket(raw, server_hostname=host),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        raise _not_our_superlink(settings, error) from None
    except ssl.SSLError as error:
        if error.reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"}:
            raise SuperNodeError(
                f"expected TLS at {settings.superlink}, found a server that does not speak it",
                "is that the SuperLink's port? It always speaks TLS",
            ) from None
        return f"TLS handshake: {error.reason or error}"
    except OSError as error:
        return error.strerror or str(error)


def _not_our_superlink(settings: Settings, error: ssl.SSLCertVerificationError) -> SuperNodeError:
    where, host = settings.superlink, settings.superlink_host
    if error.verify_code in {_WRONG_NAME, _WRONG_ADDRESS}:
        return SuperNodeError(
            f"expected a certificate for {host} at {where}, found one for other names",
            f"reach it by a name in its certificate, or: medfed certs issue --san {host}",
        )
    if error.verify_code == _EXPIRED:
        return SuperNodeError(
            f"expected a valid certificate at {where}, found one that has expired",
            "the coordinator renews it with `medfed certs renew`; is this machine's clock right?",
        )
    if error.verify_code == _NOT_YET_VALID:
        return SuperNodeError(
            f"expected a valid certificate at {where}, found one that is not valid yet",
            "is this machine's clock right?",
        )
    return SuperNodeError(
        f"expected a certificate issued by the CA in {settings.ca} at {where}, "
        f"found another CA's ({error.verify_message})",
        "ask the coordinator for the federation's ca.crt; a proxy that inspects TLS must not "
        "stand between",
    )
