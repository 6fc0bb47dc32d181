"""Start the SuperLink: check everything that can be checked, then become Flower's SuperLink.

    python -m superlink --certificate /certs/superlink.crt --key /certs/superlink.key \\
        --ca /certs/ca.crt --database /state/state.db --host 0.0.0.0

Containers and ``medfed up`` both start it this way. What is wrong is said on one line, with a hint,
and the exit status is 1. ``MEDFED_INSTITUTIONS`` (comma-separated names) goes on to ServerApps.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common.errors import SuperLinkError, tell

from .command import DEFAULT_PORT, Settings, arguments, environment


def parse(argv: list[str]) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m superlink", description="Start the SuperLink.")
    parser.add_argument("--certificate", required=True, type=Path, help="its TLS certificate")
    parser.add_argument("--key", required=True, type=Path, help="the certificate's private key")
    parser.add_argument("--ca", required=True, type=Path, help="the federation's CA certificate")
    parser.add_argument("--database", required=True, type=Path, help="its durable state (SQLite)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port (%(default)s)")
    options = parser.parse_args(argv)
    names = os.environ.get("MEDFED_INSTITUTIONS", "")
    return Settings(
        certificate=options.certificate,
        key=options.key,
        ca=options.ca,
        database=options.database,
        institutions=tuple(name.strip() for name in names.split(",") if name.strip()),
        host=options.host,
        port=options.port,
    )


def main(argv: list[str]) -> int:
    """Run the SuperLink until it is stopped; the exit status."""
    from . import database, preflight

    try:
        settings = parse(argv)
        preflight.check(settings)
        if (copy := database.back_up_before_migration(settings.database)) is not None:
            print(
                f"Flower migrates {settings.database} now; a copy of it as it was: {copy}",
                file=sys.stderr,
            )
    except SuperLinkError as error:
        return tell(error)

    os.environ.update(environment(settings, os.environ, Path(sys.executable).parent))
    from compat.superlink import run_superlink

    from .renewal import keep_renewed

    sys.argv = arguments(settings)
    run_superlink(lambda context: keep_renewed(context, settings.certificate, settings.key))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
