"""Run Flower's SuperLink with the hooks that the installed Flower allows."""

from __future__ import annotations

import sys
from logging import INFO, WARNING

from . import long_polling, replay_guard, serverapp_watchdog
from .hooks import report


def run_superlink() -> None:
    """Run ``flower-superlink`` on ``sys.argv``.

    Without the replay guard it does not start: exit status 1, and what was found on stderr.
    """
    from flwr.common import log
    from flwr.superlink.cli import flower_superlink

    found = report("superlink")
    log(INFO, "%s", found.summary())
    for warning in found.warnings():
        log(WARNING, "%s", warning)
    if not found.active(replay_guard.HOOK.name):
        sys.exit(1)
    if found.active(long_polling.HOOK.name):
        long_polling.install(serverapp_watchdog.call)
        log(INFO, "Requests for messages are held for up to %.0f s", long_polling.HOLD_FLEET_S)
    if found.active(serverapp_watchdog.HOOK.name):
        sys.argv += serverapp_watchdog.install()
    replay_guard.install()  # last, so that it stands outermost: what is held is asked twice
    flower_superlink()
