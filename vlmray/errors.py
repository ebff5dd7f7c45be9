"""Errors as one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
