"""What goes wrong in an evaluation, for the person who asked for it."""

from __future__ import annotations


class EvaluationError(Exception):
    """An evaluation that cannot go on for a reason its user can mend.

    Args:
        message: one line: what was expected and what was found.
        hint: one line: how to fix it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
