"""Errors as one line."""

from __future__ import annotations


def one_line(error: object, limit: int = 300) -> str:
    """Put what an error says on one line.

    Args:
        error: An exception, or a text about one.
        limit: Most characters.

    Returns:
        The line; the name of the error's type where it says nothing.
    """
    return " ".join(str(error).split())[:limit] or type(error).__name__
