"""Flower's ``flwr-clientapp`` as a function, for a process that was forked to become it."""

from __future__ import annotations

# What it imports, the last of them when it is called.
MODULES = ("flwr.supernode.cli", "flwr.supernode.runtime.run_clientapp")


def run_clientapp() -> None:
    """Run ``flwr-clientapp`` on ``sys.argv``."""
    from flwr.supernode.cli import flwr_clientapp

    flwr_clientapp()
