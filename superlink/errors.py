"""The one error of this room: a SuperLink that cannot start or does not do as asked, and why."""

from __future__ import annotations


class SuperLinkError(Exception):
    """Something about the SuperLink is wrong that its coordinator can mend.

    Args:
        message: one line: what was expected and what was found.
        hint: one line: how to fix it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
