"""Errors for people: what was expected, what was found, how to fix it.

One kind for each room, so that a caller can tell whose it is. ``app/`` travels to hospitals alone
and has its own (``app/errors.py``).
"""

from __future__ import annotations

import sys


class UserError(Exception):
    """Something that whoever runs the command can mend.

    Args:
        message: one line: what was expected and what was found.
        hint: one line: how to fix it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class CertsError(UserError):
    """The PKI's folder is not as it should be, in a way that its keeper can mend."""


class EmbeddedError(UserError):
    """The embedded model or data could not be prepared."""


class EvaluationError(UserError):
    """An evaluation cannot go on for a reason that its user can mend."""


class MedfedError(UserError):
    """A command of the operator's cannot do as asked."""


class SuperLinkError(UserError):
    """A SuperLink that cannot start or does not do as asked; its coordinator can mend it."""


class SuperNodeError(UserError):
    """A SuperNode that cannot do its work; the hospital's engineer can mend it."""


def tell(error: Exception) -> int:
    """Print an error and its hint on stderr, a line each.

    Returns:
        The exit status that goes with it.
    """
    message = error.args[0] if error.args else error
    print(f"error: {message}", file=sys.stderr)
    if hint := getattr(error, "hint", ""):
        print(f"hint: {hint}", file=sys.stderr)
    return 1
