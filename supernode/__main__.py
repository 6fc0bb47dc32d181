"""Start one SuperNode: check everything that can be checked, then become Flower's SuperNode.

    python -m supernode --name supernode-07 --superlink superlink:8000 \\
        --ca /certs/ca.crt --key /certs/supernode-07.key --data /data --site /site

Containers and ``medfed up`` both start it this way. What is wrong is said on one line, with a hint,
and the exit status is 1. A SuperLink that cannot be reached is not an error: it is waited for.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common.errors import SuperNodeError, tell

from .command import DEFAULT_RUNTIME_PORT, Settings, arguments, environment
from .roster import DEFAULT_ROSTER, load


def parse(argv: list[str]) -> tuple[Settings, float]:
    """Read the command line: the SuperNode, and the timeout of its activation in seconds.

    Raises:
        SuperNodeError: the name or the partition is not in the roster, or the address is malformed.
    """
    parser = argparse.ArgumentParser(prog="python -m supernode", description="Start one SuperNode.")
    parser.add_argument("--name", required=True, help="its name in the roster")
    parser.add_argument("--superlink", required=True, help="HOST:PORT of the SuperLink")
    parser.add_argument("--ca", required=True, type=Path, help="the federation's CA certificate")
    parser.add_argument("--key", required=True, type=Path, help="its private key")
    parser.add_argument(
        "--public-keys", type=Path, help="folder with NAME.pub (default: where the key is)"
    )
    parser.add_argument("--data", required=True, type=Path, help="folder with its rows")
    parser.add_argument("--roster", type=Path, default=DEFAULT_ROSTER, help="the roster file")
    parser.add_argument("--partition", type=int, help="partition id (default: the roster's)")
    parser.add_argument(
        "--runtime-port",
        type=int,
        default=DEFAULT_RUNTIME_PORT,
        help="local port for its ClientApps (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu", action="store_true", help="let ClientApps use the roster's slice of a GPU"
    )
    parser.add_argument(
        "--site", type=Path, help="folder with policy.toml: what may run here and what may leave"
    )
    parser.add_argument(
        "--audit", type=Path, help="folder of the audit log (default: audit/ in the site's folder)"
    )
    parser.add_argument(
        "--activation-timeout",
        "--patience",  # its name until 0.2
        type=float,
        default=75.0,
        help="seconds to wait while its key counts as online (default: %(default)s; a SuperNode "
        "that was killed does for 60 s)",
    )
    options = parser.parse_args(argv)
    if any(argument.split("=")[0] == "--patience" for argument in argv):
        print("warning: --patience is --activation-timeout now; it goes in 0.2", file=sys.stderr)
    if options.audit and not options.site:
        parser.error("--audit is the log of a gate, and there is none without --site")
    roster = load(options.roster)
    entry = roster.entry(options.name)
    partition = entry.partition if options.partition is None else options.partition
    settings = Settings(
        entry=entry,
        partition=roster.check_partition(partition),
        num_partitions=roster.num_partitions,
        superlink=options.superlink,
        ca=options.ca,
        key=options.key,
        public_keys=options.public_keys or options.key.parent,
        data=options.data,
        runtime_port=options.runtime_port,
        use_gpu=options.gpu,
        site=options.site,
        audit=options.audit,
    )
    return settings, options.activation_timeout


def main(argv: list[str]) -> int:
    """Run the SuperNode until it is stopped; the exit status."""
    try:
        settings, timeout = parse(argv)
        # Set before anything else is imported: thread pools read it once, when they start.
        os.environ.update(environment(settings, os.environ, Path(sys.executable).parent))
        from . import connection, enrolment, preflight

        preflight.check(settings)
        _gate(settings)
        preflight.wait_for_superlink(settings)
        node_id = enrolment.enrol(settings, timeout)
        connection.record(settings, node_id)
    except SuperNodeError as error:
        return tell(error)
    except KeyboardInterrupt:
        return 130

    from compat.supernode import run_supernode

    from .wire import wire_log

    sys.argv = arguments(settings)
    run_supernode(wire_log().reply_left)
    return 0


def _gate(settings: Settings) -> None:
    """Put this hospital's gate in place; without one, say so.

    Raises:
        SuperNodeError: there should be one, and it cannot stand.
    """
    if settings.site is None:
        print(
            f"warning: {settings.name} has no site gate (--site): it runs whatever the "
            "coordinator starts, and whatever that answers leaves",
            file=sys.stderr,
        )
        return
    from .gate.install import install
    from .gate.site import Site

    install(settings.name, Site.at(settings.site, settings.audit))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
