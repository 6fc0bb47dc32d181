"""Does the SuperLink answer? ``python -m superlink.health --ca CA`` exits 0 if so, else 1 with why.

One verified TLS request to ``/health``, with the standard library only. What will expire soon is
said too: it is no reason yet to take the SuperLink for ill.
"""

from __future__ import annotations

import argparse
import http.client
import ssl
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOON_DAYS = 30


def problem(host: str, port: int, ca: Path, timeout: float = 5.0) -> str | None:
    """What is wrong with the SuperLink at ``host:port``; None if it answers as it should."""
    return look(host, port, ca, timeout)[0]


def look(host: str, port: int, ca: Path, timeout: float = 5.0) -> tuple[str | None, list[str]]:
    """What is wrong, and a line for each certificate with less than ``SOON_DAYS`` days left."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cafile=str(ca))
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        try:
            connection.request("GET", "/health")
            shown = connection.sock.getpeercert() or {}
            status = connection.getresponse().status
        finally:
            connection.close()
    except ssl.SSLCertVerificationError as error:
        return f"SuperLink at {host}:{port}: {error.verify_message}", []
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or error
        return f"SuperLink at {host}:{port}: {reason}", []
    if status != 200:
        return f"SuperLink at {host}:{port}: /health answers {status}", []
    ends = {
        "the SuperLink's certificate": _end(shown),
        # While the CA is rotated there are two: trust ends with the later one.
        "the CA": max(_end(one) for one in context.get_ca_certs()),
    }
    return None, [
        f"{what} ends in {int(left // 86400)} days: `medfed certs check`"
        for what, end in ends.items()
        if (left := end - time.time()) < SOON_DAYS * 86400
    ]


def _end(certificate: Mapping[str, Any]) -> float:
    return ssl.cert_time_to_seconds(str(certificate["notAfter"]))


def main(argv: list[str]) -> int:
    """Print what is wrong, if anything is; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m superlink.health")
    parser.add_argument("--ca", required=True, type=Path, help="the federation's CA certificate")
    parser.add_argument("--host", default="localhost", help="a name in the SuperLink's certificate")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(argv)
    trouble, soon = look(options.host, options.port, options.ca)
    if trouble is not None:
        print(trouble, file=sys.stderr)
        return 1
    for line in soon:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
