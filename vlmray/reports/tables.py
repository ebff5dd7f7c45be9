"""Tables for a terminal and for a page."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlmray.reports.gallery import Verdict
from vlmray.reports.text import TERMINAL_WIDTH, clean_text, display_width, format_with_range, pad

# ---------------------------------------------------------------------------------------------
# Building blocks: tables, galleries, facts
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """Heading of a table column; numbers are set flush right."""

    label: str
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell with a bar beside its text."""

    text: str
    bar: float | None = None
    """0 to 1; None draws none."""

    interval: tuple[float, float] | None = None
    """Around the end of the bar, 0 to 1."""


def ranged_cell(share: float, low: float, high: float) -> Cell:
    """Return a cell of a share and the interval around it, each 0 to 1."""
    return Cell(format_with_range(share, low, high), share, (low, high))


@dataclass(frozen=True, slots=True)
class Mark:
    """A table cell that says how something ended, with the sign and colour of its verdict."""

    verdict: Verdict
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts, for the page, for Markdown and for a terminal."""

    title: str
    columns: tuple[Column, ...]
    """The first column names the row."""

    rows: tuple[tuple[str | Cell | Mark, ...], ...]
    note: str = ""
    collapsed: bool = False
    """Fold the table away behind its title on the page."""

    def is_barred(self, column: int) -> bool:
        """Tell whether a column has bars."""
        return any(isinstance(row[column], Cell) for row in self.rows)

    def is_ranged(self, column: int) -> bool:
        """Tell whether a column has bars with intervals."""
        return any(isinstance(cell := row[column], Cell) and cell.interval is not None for row in self.rows)

    def to_markdown(self) -> str:
        """Format as a GitHub table; what Markdown would read as its own is escaped."""
        rows = [[re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text) for text in row] for row in self._texts()]
        rows.insert(1, ["---:" if column.numeric else "---" for column in self.columns])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def to_text(self, width: int = TERMINAL_WIDTH) -> str:
        """Format for a terminal; the first column gives way where the table is too wide."""
        rows = self._texts()
        widths = [max(map(display_width, texts)) for texts in zip(*rows, strict=True)]
        others = sum(widths[1:]) + 2 * len(widths[1:])
        widths[0] = min(widths[0], max(width - others, 8))
        rows.insert(1, ["-" * column_width for column_width in widths])
        numeric = [column.numeric for column in self.columns]
        return "\n".join("  ".join(map(pad, row, widths, numeric)).rstrip() for row in rows)

    def _texts(self) -> list[list[str]]:
        """Return the heading and the rows as texts of one line each, safe to print."""
        heading = [column.label for column in self.columns]
        rows = ([cell if isinstance(cell, str) else cell.text for cell in row] for row in self.rows)
        return [[" ".join(clean_text(text).split()) for text in row] for row in (heading, *rows)]
