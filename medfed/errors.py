"""What goes wrong in an operator's command, and how to fix it."""

from __future__ import annotations


class MedfedError(Exception):
    """Something that the operator can mend.

    Args:
        message: one line: what was expected and what was found.
        hint: one line: how to fix it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
