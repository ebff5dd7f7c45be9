"""One self-contained HTML page from tables, plots, galleries and facts; measures nothing.

    Table, Plot, LanePlot, Gallery, Fact -> Page -> render_page -> HTML text

The building blocks that any report is made of, and the formatting of their texts and numbers. What a
report says is up to its own module; see `report.py` for that of an inference run. A table can also be
set for a terminal or as Markdown.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageOps

from vlmray.reports.lanes import LanePlot, draw_lanes
from vlmray.reports.plots import PATH_SIZE, Drawing, Plot, draw, list_values

Row = Mapping[str, Any]
"""A result row; `GalleryItem.from_row` says what it reads."""

Verdict = Literal["wrong", "partial", "failed", "right", "unscored"]

VERDICT_LABELS: dict[Verdict, tuple[str, str]] = {
    "wrong": ("✕", "Wrong"),
    "partial": ("◐", "Partly right"),
    "failed": ("!", "Failed"),
    "right": ("✓", "Right"),
    "unscored": ("–", "Not scored"),
}

TERMINAL_WIDTH = 80

THUMBNAIL_MAX_BYTES = 45_000
"""60 thumbnails of this size make 3.6 MB of base64, so a full gallery stays below 4 MB."""

EXCERPT_CHARS = 180
MAX_TEXT_CHARS = 4_000
"""Longest text the page carries of one field; the rest is counted, and is in the result files."""


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
        return "\n".join("  ".join(map(_pad, row, widths, numeric)).rstrip() for row in rows)

    def _texts(self) -> list[list[str]]:
        """Return the heading and the rows as texts of one line each, safe to print."""
        heading = [column.label for column in self.columns]
        rows = ([cell if isinstance(cell, str) else cell.text for cell in row] for row in self.rows)
        return [[" ".join(clean_text(text).split()) for text in row] for row in (heading, *rows)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryItem:
    """One sample as a card: what was asked, what is accepted, what the model said."""

    sample_id: str
    question: str
    answers: tuple[str, ...] = ()
    prediction: str | None = None
    score: float | None = None
    error: str | None = None
    family: str | None = None
    image: bytes | None = None
    """Encoded image of any size; the page carries a thumbnail."""

    num_completion_tokens: int | None = None
    beside: tuple[tuple[str, str], ...] = ()
    """Names and texts of what else was said of it, by another model say."""

    @property
    def verdict(self) -> Verdict:
        """Name the outcome."""
        return verdict_of(self.score, self.error)

    @classmethod
    def from_row(cls, row: Row, image: bytes | None = None) -> GalleryItem:
        """Make the card of a result row, whose columns have the names of the fields."""
        answers = row.get("answers")
        return cls(
            sample_id=row["sample_id"],
            question=row.get("question") or "",
            answers=() if answers is None else tuple(answers),
            prediction=row.get("prediction"),
            score=read_number(row.get("score")),
            error=row.get("error"),
            family=row.get("family"),
            image=image,
            num_completion_tokens=row.get("num_completion_tokens"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Cards with filters by verdict and family."""

    title: str
    items: tuple[GalleryItem, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fact:
    """A number with its name, for the line of facts below the headline."""

    label: str
    value: str
    note: str = ""


Section = Table | Plot | LanePlot | Gallery


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What `render_page` lays out, top to bottom."""

    title: str
    headline: Fact
    """The one number to take away."""

    facts: tuple[Fact, ...] = ()
    sections: tuple[Section, ...] = ()
    """Plots that follow each other stand side by side where there is room."""


def verdict_of(score: float | None, error: str | None) -> Verdict:
    """Name the outcome of a row: a score strictly between 0 and 1 is partly right."""
    if error is not None:
        return "failed"
    if score is None:
        return "unscored"
    if score <= 0:
        return "wrong"
    return "right" if score >= 1 else "partial"


# ---------------------------------------------------------------------------------------------
# Thumbnails
# ---------------------------------------------------------------------------------------------


def thumbnail_data_uri(
    image: bytes, *, max_width: int = 480, max_bytes: int = THUMBNAIL_MAX_BYTES
) -> str | None:
    """Encode an image as a small data URI, PNG or JPEG, whichever is smaller.

    Args:
        image: Encoded image bytes, of any format Pillow reads.
        max_width: Pixels; the height is at most one and a half times that.
        max_bytes: Encoded size to aim for; quality and then size give way.

    Returns:
        The data URI, or None where the bytes are not a readable image.
    """
    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.draft("RGB", (2 * max_width, 3 * max_width))  # decodes large JPEGs at a lower size
            picture = _flatten(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    for scale in (1.0, 0.7, 0.4, 0.2):
        small = picture.copy()
        small.thumbnail((max(1, int(max_width * scale)), max(1, int(1.5 * max_width * scale))))
        encoded = [_encode(small, "PNG", optimize=True)]
        encoded += [_encode(small, "JPEG", quality=quality, optimize=True) for quality in (82, 60)]
        # The best that fits, else the smallest of this size, at the next scale if there is one.
        fitting = [option for option in encoded[:2] if len(option[1]) <= max_bytes]
        media_type, data = min(fitting or encoded, key=lambda option: len(option[1]))
        if len(data) <= max_bytes:
            break
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _flatten(picture: Image.Image) -> Image.Image:
    """Convert to RGB, transparent pixels over white as a browser's page would show them."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _encode(picture: Image.Image, image_format: str, **options: Any) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return f"image/{image_format.lower()}", buffer.getvalue()


# ---------------------------------------------------------------------------------------------
# HTML
# ---------------------------------------------------------------------------------------------


def render_page(page: Page) -> str:
    """Lay a page out as one HTML text: no network, no scripts but its own, texts escaped."""
    return _environment().get_template("report.html.j2").render(page=page).lstrip()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # predictions are whatever a model wrote
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(clean=clean_text, excerpt=_excerpt, sha256=_sha256, thumbnail=_thumbnail)
    environment.filters.update(draw=_draw, value_table=_value_table, group_plots=_group_plots)
    environment.tests.update(
        gallery=lambda section: isinstance(section, Gallery),
        lanes=lambda section: isinstance(section, LanePlot),
        plot=lambda section: isinstance(section, Plot | LanePlot),
        mark=lambda cell: isinstance(cell, Mark),
    )
    environment.globals.update(verdict_labels=VERDICT_LABELS, path_size=PATH_SIZE)
    return environment


def _finalize(value: Any) -> Any:
    """Clean every text the template puts out, but not what it has built itself."""
    return clean_text(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _sha256(text: str) -> str:
    """Hash an inline script or style as its Content-Security-Policy wants it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _thumbnail(image: bytes | None) -> str | None:
    return None if image is None else thumbnail_data_uri(image)


def _draw(plot: Plot | LanePlot) -> Drawing | None:
    return draw_lanes(plot) if isinstance(plot, LanePlot) else draw(plot)


def _value_table(plot: Plot) -> Table:
    """List the values of a plot, for those who want to read them off."""
    return Table(
        title=f"{plot.title}: values",
        columns=(Column(plot.x_label), *(Column(series.name, numeric=True) for series in plot.series)),
        rows=tuple(map(tuple, list_values(plot))),
    )


def _group_plots(sections: Iterable[Section]) -> list[tuple[bool, list[Section]]]:
    """Group open plots that follow each other: (True, plots) or (False, other sections)."""
    groups = groupby(
        sections, key=lambda section: isinstance(section, Plot | LanePlot) and not section.collapsed
    )
    return [(are_plots, list(group)) for are_plots, group in groups]


def _excerpt(text: str) -> tuple[str, str]:
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


def _pad(text: str, width: int, flush_right: bool) -> str:
    text = fit(text, width)
    padding = " " * (width - display_width(text))
    return padding + text if flush_right else text + padding


def _cut(text: str, width: int) -> str:
    while display_width(text) > width:
        text = text[:-1]
    return text
