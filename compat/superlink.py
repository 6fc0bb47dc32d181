"""Run Flower's SuperLink with the hooks that the installed Flower allows."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Callable
from logging import ERROR, INFO, WARNING

from .hooks import report


def run_superlink(
    context_made: Callable[[ssl.SSLContext], None] = lambda context: None,
) -> None:
    """Run ``flower-superlink`` on ``sys.argv``.

    Without the replay guard it does not start: exit status 1, and what was found in the log.

    Args:
        context_made: called with the TLS context that is served with, before it is used.
    """
    from flwr.common import log
    from flwr.superlink.cli import flower_superlink

    found = report("superlink")
    log(INFO, "%s", found.summary())
    for warning in found.warnings():
        log(WARNING, "%s", warning)
    if not found.active("replay_guard"):
        log(ERROR, "Without replay_guard the SuperLink does not start")
        sys.exit(1)
    # A hook's file is imported once it is known that Flower has what it imports.
    from . import replay_guard, serverapp_watchdog

    if found.active("long_polling"):
        from . import long_polling

        long_polling.install(serverapp_watchdog.call)
        log(INFO, "Requests for messages are held for up to %.0f s", long_polling.HOLD_FLEET_S)
    if found.active("serverapp_watchdog"):
        sys.argv += serverapp_watchdog.install()
    if found.active("certificate_renewal"):
        from . import certificate_renewal

        certificate_renewal.install(context_made)
    replay_guard.install()  # last, so that it stands outermost: what is held is asked twice
    flower_superlink()
