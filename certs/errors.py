"""The one error of this room: a key or certificate that cannot be issued or read, and why."""

from __future__ import annotations


class CertsError(Exception):
    """The PKI's folder is not as it should be, in a way that its keeper can mend.

    Args:
        message: one line: what was expected and what was found.
        hint: one line: how to fix it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
