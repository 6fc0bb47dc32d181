"""Put the gate in place in a SuperNode's process, if the installed Flower is one that it knows."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from common.errors import SuperNodeError
from compat import site_gate
from compat.digests import SUPPORTED

from .audit import AuditLog
from .policy import load as load_policy
from .site import Site


def install(name: str, site: Site) -> None:
    """Put the gate in place in this process, before its SuperNode starts.

    Args:
        name: the SuperNode's.
        site: its policy and its audit log.

    Raises:
        SuperNodeError: the policy has an error, the log cannot be continued, or the installed
            Flower has changed where the gate stands.
    """
    if problems := site_gate.HOOK.differences():
        raise SuperNodeError(
            f"expected a Flower that the site gate knows, found: {'; '.join(problems)}",
            f"flwr {' and '.join(SUPPORTED)} are known to it; without its gate this SuperNode does "
            "not start",
        )
    from .gate import Gate  # it imports names of Flower's that are known to be there now

    policy = load_policy(site.policy)
    audit = AuditLog(site.audit)
    _forget_installed_apps()
    audit.append(
        "started",
        name=name,
        policy=policy.sha256,
        approved=[one.sha256 for one in policy.approvals],
    )
    site_gate.install(lambda connection: Gate(name, policy, audit, connection).guarded())


def _forget_installed_apps() -> None:
    """Flower runs what it finds under eight digits of a FAB's hash: let it install anew."""
    home = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    shutil.rmtree(home / "apps", ignore_errors=True)
