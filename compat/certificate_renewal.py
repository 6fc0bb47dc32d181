"""Hook: the SuperLink's TLS context is handed out, so that a new certificate can be loaded into it.

Flower gives uvicorn the names of two files, and uvicorn reads them once, when it starts: a renewed
certificate takes effect when the SuperLink is started again. uvicorn has an option for a context of
one's own (``ssl_context_factory``), which Flower does not pass on. ``superlink/renewal.py`` says
when a certificate is loaded again.

Replaced: ``uvicorn`` in ``flower_superlink``.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from .digests import replace
from .hooks import Hook

_COMMAND = "flwr.superlink.cli.flower_superlink"
HOOK = Hook(
    name="certificate_renewal",
    gives="a renewed certificate is used while the SuperLink runs",
    without="a renewed certificate is used when the SuperLink is started again",
    # The one place where this module of Flower's uses uvicorn.
    pins={_COMMAND: {"_run_superlink_http_api": "eb0d78b85f999576"}},
)


def install(context_made: Callable[[ssl.SSLContext], None]) -> None:
    """Have the SuperLink that this process is about to start hand out its TLS context.

    Args:
        context_made: called with the context, in which its certificate is, before it is used.
    """
    import uvicorn

    def make_context(config: Any, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        del config
        context = default()
        context_made(context)
        return context

    def run(**options: Any) -> None:
        uvicorn.run(**options, ssl_context_factory=make_context)

    replace(_COMMAND, "uvicorn", SimpleNamespace(run=run))
