"""Words and numbers as reports and terminals show them."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

TERMINAL_WIDTH = 80

EXCERPT_CHARS = 180
MAX_TEXT_CHARS = 4_000
"""Longest text the page carries of one field; the rest is counted, and is in the result files."""


def excerpt(text: str) -> tuple[str, str]:
    """Split a text into what is shown at first and, where that is not all, the whole."""
    if len(text) > MAX_TEXT_CHARS:
        more = len(text) - MAX_TEXT_CHARS
        text = f"{text[:MAX_TEXT_CHARS]}… ({more:,} more characters in the result files)"
    return (text, "") if len(text) <= EXCERPT_CHARS * 1.25 else (f"{text[:EXCERPT_CHARS].rstrip()}…", text)


# ---------------------------------------------------------------------------------------------
# Texts and numbers
# ---------------------------------------------------------------------------------------------


def clean_text(text: str) -> str:
    """Replace what no page and no terminal should get: control characters and lone surrogates."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(char) in {"Cc", "Cs"} and char not in "\t\n\r"
        else char
        for char in text
    )


def shorten(text: str, width: int) -> str:
    """Cut a text to `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def read_number(value: Any) -> float | None:
    """Read a number that may be missing, which some table readers return as NaN."""
    return None if value is None or math.isnan(value) else float(value)


def format_with_range(share: float, low: float, high: float) -> str:
    """Format a share with the interval around it, each 0 to 1."""
    return f"{format_percent(share)} ({100 * low:.1f}–{100 * high:.1f})"


def format_percent(share: float | None) -> str:
    """Format 0 to 1 with one decimal; never rounds to a full 0 or 100 what is not."""
    if share is None:
        return "–"
    percent = 100 * share
    if 0 < percent < 0.05:
        return "<0.1 %"
    if 99.95 <= percent < 100:
        return ">99.9 %"
    return f"{percent:.1f} %"


def format_points(difference: float) -> str:
    """Format a difference of shares in percentage points."""
    points = round(100 * difference, 1) + 0.0  # no -0.0
    return f"{points:+.1f}" if points else "0.0"


def format_duration(seconds: float) -> str:
    """Format seconds as `0.42 s`, `12.3 s`, `1 min 15 s` or `2 h 1 min`."""
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def format_rate(rate: float | None) -> str:
    """Format an amount per second with about three significant digits."""
    if rate is None:
        return "–"
    decimals = 0 if rate >= 100 else 1 if rate >= 10 else 2 if rate >= 0.1 else 4
    return f"{rate:,.{decimals}f}"


def display_width(text: str) -> int:
    """Count terminal columns: wide characters take two, combining ones none."""
    return sum(_char_width(char) for char in text)


def _char_width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in {"Cf", "Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def fit(text: str, width: int = TERMINAL_WIDTH) -> str:
    """Cut a text to `width` terminal columns."""
    return text if display_width(text) <= width else _cut(text, width - 1) + "…"


def pad(text: str, width: int, flush_right: bool) -> str:
    """Fit a text to a column of the terminal."""
    text = fit(text, width)
    padding = " " * (width - display_width(text))
    return padding + text if flush_right else text + padding


def _cut(text: str, width: int) -> str:
    while display_width(text) > width:
        text = text[:-1]
    return text
