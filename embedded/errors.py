"""Errors of preparing the embedded model and data."""

from __future__ import annotations


class EmbeddedError(Exception):
    """Something could not be prepared.

    Args:
        message: one line: what was expected and what was found.
        hint: one line: how to fix it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
