"""Does the SuperLink answer? ``python -m superlink.health --ca CA`` exits 0 if so, else 1 with why.

One verified TLS request to ``/health``, with the standard library only.
"""

from __future__ import annotations

import argparse
import http.client
import ssl
import sys
from pathlib import Path


def problem(host: str, port: int, ca: Path, timeout: float = 5.0) -> str | None:
    """What is wrong with the SuperLink at ``host:port``; None if it answers as it should."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cafile=str(ca))
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
        finally:
            connection.close()
    except ssl.SSLCertVerificationError as error:
        return f"SuperLink at {host}:{port}: {error.verify_message}"
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or error
        return f"SuperLink at {host}:{port}: {reason}"
    return None if status == 200 else f"SuperLink at {host}:{port}: /health answers {status}"


def main(argv: list[str]) -> int:
    """Print what is wrong, if anything is; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m superlink.health")
    parser.add_argument("--ca", required=True, type=Path, help="the federation's CA certificate")
    parser.add_argument("--host", default="localhost", help="a name in the SuperLink's certificate")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(argv)
    if (trouble := problem(options.host, options.port, options.ca)) is not None:
        print(trouble, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
