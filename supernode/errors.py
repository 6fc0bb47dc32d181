"""The one error of this room: a SuperNode that cannot start, or is not connected, and why."""

from __future__ import annotations


class SuperNodeError(Exception):
    """A SuperNode cannot do its work for a reason that the hospital's engineer can mend.

    Args:
        message: one line: what was expected and what was found.
        hint: one line: how to fix it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
