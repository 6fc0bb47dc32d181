"""Errors that a person can act on: what was expected, what was found, how to fix it."""

from __future__ import annotations

import logging


class AppError(Exception):
    """A run cannot go on for a reason that its operator can mend.

    Args:
        message: one line: what was expected and what was found.
        hint: one line: how to fix it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.args[0]} (hint: {self.hint})" if self.hint else str(self.args[0])


class _OneLine(logging.Filter):
    """Print an AppError as the line it is; every other exception keeps its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, AppError):
            record.msg, record.args, record.exc_info = f"{error}", (), None
        return True


def log_app_errors_on_one_line() -> None:
    """Flower logs whatever an app raises with its traceback; ours are meant for operators."""
    logger = logging.getLogger("flwr")
    if not any(isinstance(existing, _OneLine) for existing in logger.filters):
        logger.addFilter(_OneLine())
