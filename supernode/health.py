"""Is this SuperNode connected? ``python -m supernode.health`` exits 0 if so, else 1 and says why.

It looks at two things and changes neither: the local port on which ClientApps reach the SuperNode,
and the evidence that the SuperLink has answered a signed request of this SuperNode lately.
Only the standard library: twenty SuperNodes run this every few seconds.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
import time
from pathlib import Path

# The SuperLink itself takes a SuperNode for lost after two heartbeat intervals of 30 s.
FRESH_S = 60.0
SOON_DAYS = 30
_TIMEOUT_S = 5.0


def problem(evidence: Path) -> str | None:
    """What is wrong with the SuperNode that writes ``evidence``; None if it is connected."""
    try:
        content = json.loads(evidence.read_text(encoding="utf-8"))
        age = time.time() - evidence.stat().st_mtime
        name, port, pid = content["name"], int(content["runtime-port"]), int(content["pid"])
    except FileNotFoundError:
        return "the SuperLink has not accepted this SuperNode yet"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"cannot read {evidence}: {error}"
    if not Path(f"/proc/{pid}").exists():
        return f"{name}: its process (pid {pid}) is gone"
    if age > FRESH_S:
        return f"{name}: no answer from the SuperLink at {content['superlink']} for {age:.0f} s"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except OSError as error:
        return f"{name}: port {port} for its ClientApps does not answer: {error.strerror or error}"
    finally:
        connection.close()
    return None if status == 200 else f"{name}: port {port} for its ClientApps answers {status}"


def expiry(evidence: Path) -> str | None:
    """A line if the CA that the SuperNode trusts ends within ``SOON_DAYS`` days; else None."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca = json.loads(evidence.read_text(encoding="utf-8"))["ca"]
    try:
        context.load_verify_locations(ca)
    except OSError as error:  # ssl.SSLError is one
        return f"cannot read the CA's certificate {ca}: {error.strerror or error}"
    # While the CA is rotated there are two: trust ends with the later one.
    end = max(ssl.cert_time_to_seconds(str(one["notAfter"])) for one in context.get_ca_certs())
    days = int((end - time.time()) // 86400)
    if days >= SOON_DAYS:
        return None
    return f"the CA ends in {days} days: ask the coordinator for the new ca.crt"


def main() -> int:
    """Print what is wrong, if anything is; the exit status."""
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    if (trouble := problem(home / "connection.json")) is not None:
        print(trouble, file=sys.stderr)
        return 1
    if (soon := expiry(home / "connection.json")) is not None:
        print(soon)
    return 0


if __name__ == "__main__":
    sys.exit(main())
