"""A renewed certificate takes effect while the SuperLink runs: no run is stopped for it.

Flower's SuperLink reads its certificate once. ``compat/certificate_renewal.py`` hands out the TLS
context that it serves with: when the certificate's file has changed it is loaded into that context,
and new connections are shown the new one. What does not load (a certificate without its key, half a
hand-out) is said and left alone.
"""

from __future__ import annotations

import ssl
import threading
from logging import INFO, WARNING
from pathlib import Path

LOOK_S = 5.0


class Renewal:
    """Loads a certificate into a TLS context again whenever its file has changed.

    Args:
        context: that a server uses.
        certificate: PEM file.
        key: its private key.
    """

    def __init__(self, context: ssl.SSLContext, certificate: Path, key: Path) -> None:
        self._context, self._certificate, self._key = context, certificate, key
        self._seen = certificate.read_bytes()

    def look(self) -> bool:
        """Look at the file once; whether a new certificate is in use now.

        Raises:
            OSError: the file is gone, or what is in it is no certificate of this key.
        """
        content = self._certificate.read_bytes()
        if content == self._seen:
            return False
        self._seen = content
        # A context is changed even by a pair that does not match: try it on another one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate, self._key)
        self._context.load_cert_chain(self._certificate, self._key)
        return True

    def watch(self, stop: threading.Event, every: float = LOOK_S) -> None:
        """Look again and again until ``stop`` is set."""
        from flwr.common import log

        while not stop.wait(every):
            try:
                if self.look():
                    log(INFO, "The SuperLink's certificate was renewed; new connections get it")
            except OSError as error:  # ssl.SSLError is one
                log(WARNING, "The SuperLink's certificate cannot be renewed: %s", error)


def keep_renewed(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Load a certificate into ``context`` whenever its file has changed, in a thread."""
    renewal = Renewal(context, certificate, key)
    threading.Thread(
        target=renewal.watch, args=(threading.Event(),), name="renewal", daemon=True
    ).start()
