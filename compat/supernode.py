"""Run Flower's SuperNode with the hooks that the installed Flower allows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from logging import INFO, WARNING

from .hooks import report


def run_supernode(reply_left: Callable[[int], None] = lambda run_id: None) -> None:
    """Run ``flower-supernode`` on ``sys.argv``. Nothing is changed before this is called.

    Args:
        reply_left: told the run of each reply that has reached the SuperLink.
    """
    from flwr.common import log
    from flwr.supernode.cli import flower_supernode

    found = report("supernode")
    log(INFO, "%s", found.summary())
    for warning in found.warnings():
        log(WARNING, "%s", warning)
    # A hook's file is imported once it is known that Flower has what it imports.
    if found.active("retry"):
        from . import retry

        retry.install()
    own_isolation = any(argument.split("=")[0] == "--isolation" for argument in sys.argv)
    if own_isolation:
        log(WARNING, "supernode_polling is off: --isolation was given")
    elif found.active("supernode_polling"):
        from . import supernode_polling

        sys.argv += supernode_polling.install(
            with_heartbeats=found.active("heartbeats"),
            with_watchdog=found.active("clientapp_watchdog"),
            reply_left=reply_left,
        )
    flower_supernode()
