"""Results as a closing table, Markdown, JSON and one self-contained HTML page; measures nothing.

    result rows -> summarize, group_errors, choose_gallery -> Report -> render_html, render_markdown, ...

Two layers. `Table`, `Gallery` and `Page` are general: any job composes them and `render_page` lays
them out. `Summary` and `Report` are what one inference run fills in. All functions return text, so
whoever owns the output folder decides how it is written.

Result rows are mappings with the keys `sample_id`, `family`, `score` (None where there is nothing to
compare with), `error` (None where the row was answered), `num_prompt_tokens`, `num_completion_tokens`;
the gallery also reads `question`, `answers` and `prediction`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image, ImageOps

Row = Mapping[str, Any]
Verdict = Literal["wrong", "partial", "failed", "right", "unscored"]

NO_FAMILY = "(no family)"
TERMINAL_WIDTH = 80

THUMBNAIL_MAX_BYTES = 45_000
"""60 thumbnails of this size make 3.6 MB of base64, so a full gallery stays below 4 MB."""

EXCERPT_CHARS = 180
MAX_TEXT_CHARS = 4_000
"""Longest text the page carries of one field; the rest is counted, and is in the result files."""


# ---------------------------------------------------------------------------------------------
# Result rows
# ---------------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """Read a score; a missing one comes back from some table readers as NaN."""
    return None if value is None or math.isnan(value) else float(value)


def _is_failed(row: Row) -> bool:
    return row.get("error") is not None


def _family_of(row: Row) -> str:
    return row.get("family") or NO_FAMILY


def _sorted_families(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == NO_FAMILY, name))


def _answers(row: Row) -> tuple[str, ...]:
    answers = row.get("answers")
    return () if answers is None else tuple(answers)


# ---------------------------------------------------------------------------------------------
# Building blocks: tables, galleries, pages
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """Heading of a table column; numbers are set flush right."""

    label: str
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell with a bar beside its text; `bar` is 0 to 1, None draws none."""

    text: str
    bar: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of texts, for the page, for Markdown and for a terminal."""

    title: str
    columns: tuple[Column, ...]
    """The first column names the row."""

    rows: tuple[tuple[str | Cell, ...], ...]
    note: str = ""
    collapsed: bool = False
    """Fold the table away behind its title on the page."""

    def texts(self) -> list[list[str]]:
        """Return the texts of the cells, row by row, safe to print."""
        return [
            [clean_text(cell.text if isinstance(cell, Cell) else cell) for cell in row] for row in self.rows
        ]

    def is_barred(self, column: int) -> bool:
        """Tell whether a column has bars."""
        return any(isinstance(row[column], Cell) for row in self.rows)

    def to_markdown(self) -> str:
        """Format as a GitHub table."""
        return markdown_table(
            [column.label for column in self.columns],
            self.texts(),
            numeric=[column.numeric for column in self.columns],
        )

    def to_text(self, width: int = TERMINAL_WIDTH) -> str:
        """Format for a terminal; the first column gives way where the table is too wide."""
        rows = [[column.label for column in self.columns], *self.texts()]
        rows = [[" ".join(text.split()) for text in row] for row in rows]
        widths = [max(map(_display_width, texts)) for texts in zip(*rows, strict=True)]
        others = sum(widths[1:]) + 2 * len(widths[1:])
        widths[0] = min(widths[0], max(width - others, 8))
        rows.insert(1, ["-" * column_width for column_width in widths])
        numeric = [column.numeric for column in self.columns]
        return "\n".join("  ".join(map(_pad, row, widths, numeric)).rstrip() for row in rows)


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

    @property
    def verdict(self) -> Verdict:
        """Name the outcome."""
        return verdict_of(self.score, self.error)

    @classmethod
    def from_row(cls, row: Row, image: bytes | None = None) -> GalleryItem:
        """Make the card of a result row."""
        return cls(
            sample_id=row["sample_id"],
            question=row.get("question") or "",
            answers=_answers(row),
            prediction=row.get("prediction"),
            score=_number(row.get("score")),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What `render_page` lays out, top to bottom."""

    title: str
    headline: Fact
    """The one number to take away."""

    facts: tuple[Fact, ...] = ()
    sections: tuple[Table | Gallery, ...] = ()


def markdown_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[bool] = ()
) -> str:
    """Format a GitHub table; pipes and line breaks in the texts are escaped.

    Args:
        headers: Column names.
        rows: One text for each column.
        numeric: Which columns are set flush right; none by default.
    """
    rules = [
        ("---:" if is_numeric else "---") for is_numeric, _ in zip_longest(numeric, headers, fillvalue=False)
    ]
    lines = [headers, rules, *rows]
    return "\n".join("| " + " | ".join(map(_markdown_cell, line)) + " |" for line in lines)


def _markdown_cell(text: str) -> str:
    text = " ".join(text.split())
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text)


# ---------------------------------------------------------------------------------------------
# Gallery: which samples, and how they look
# ---------------------------------------------------------------------------------------------


_VERDICT_LABELS: dict[Verdict, tuple[str, str]] = {
    "wrong": ("✕", "Wrong"),
    "partial": ("◐", "Partly right"),
    "failed": ("!", "Failed"),
    "right": ("✓", "Right"),
    "unscored": ("–", "Not scored"),
}

# Places kept for each group when all of them overflow: the wrong ones tell most, yet a gallery
# without a right one would hide what the model can do.
_GALLERY_SHARES: tuple[tuple[tuple[Verdict, ...], float], ...] = (
    (("wrong", "partial"), 0.5),
    (("failed",), 0.2),
    (("right", "unscored"), 0.3),
)


def verdict_of(score: float | None, error: str | None) -> Verdict:
    """Name the outcome of a row: a score strictly between 0 and 1 is partly right."""
    if error is not None:
        return "failed"
    if score is None:
        return "unscored"
    if score <= 0:
        return "wrong"
    return "right" if score >= 1 else "partial"


def choose_gallery(rows: Iterable[Row], limit: int = 60) -> list[Row]:
    """Choose rows to show: wrong ones first, then failed, then right ones, spread over families.

    The choice depends on the rows alone, not on their order. Wrong rows get half of the places,
    failed ones a fifth, right ones the rest; places one group leaves free go to the others.
    """
    groups: list[list[Row]] = [[] for _ in _GALLERY_SHARES]
    for row in rows:
        verdict = verdict_of(_number(row.get("score")), row.get("error"))
        index = next(i for i, (verdicts, _) in enumerate(_GALLERY_SHARES) if verdict in verdicts)
        groups[index].append(row)
    sizes = [
        min(len(group), int(limit * share)) for group, (_, share) in zip(groups, _GALLERY_SHARES, strict=True)
    ]
    for index in (0, 2, 1):  # failed rows take what is left last: they look alike, and are listed by cause
        sizes[index] += max(0, min(len(groups[index]) - sizes[index], limit - sum(sizes)))
    return [row for group, size in zip(groups, sizes, strict=True) for row in _spread(group)[:size]]


def _spread(rows: Iterable[Row]) -> list[Row]:
    """Deal rows out family by family, so that any prefix shows all families about equally."""
    by_family: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["sample_id"]):
        by_family.setdefault(_family_of(row), []).append(row)
    dealt = zip_longest(*(by_family[name] for name in _sorted_families(by_family)))
    return [row for row in chain.from_iterable(dealt) if row is not None]


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
# Page: HTML
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
    environment.filters.update(
        breakable=_breakable, csp_hash=_csp_hash, excerpt=_excerpt, thumbnail=_thumbnail
    )
    environment.tests["gallery"] = lambda section: isinstance(section, Gallery)
    environment.globals["verdict_labels"] = _VERDICT_LABELS
    return environment


def _finalize(value: Any) -> Any:
    return clean_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _breakable(text: str) -> Markup:
    """Let a long name break after an underscore or a slash rather than anywhere."""
    return Markup(re.sub(r"([_/])", r"\1<wbr>", str(escape(clean_text(text)))))


def _csp_hash(text: str) -> Markup:
    """Hash an inline script or style as its Content-Security-Policy wants it."""
    digest = hashlib.sha256(text.encode()).digest()
    return Markup(f"'sha256-{base64.b64encode(digest).decode('ascii')}'")


def _thumbnail(image: bytes | None) -> str | None:
    return None if image is None else thumbnail_data_uri(image)


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


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _display_width(text: str) -> int:
    """Count terminal columns: wide characters take two, combining ones none."""
    return sum(_char_width(char) for char in text)


def _char_width(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in {"Cf", "Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _pad(text: str, width: int, flush_right: bool) -> str:
    if _display_width(text) > width:
        text = _cut(text, width - 1) + "…"
    padding = " " * (width - _display_width(text))
    return padding + text if flush_right else text + padding


def _cut(text: str, width: int) -> str:
    while _display_width(text) > width:
        text = text[:-1]
    return text


# ---------------------------------------------------------------------------------------------
# Summary: the arithmetic
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySummary:
    """Counts and score of one family of questions."""

    name: str
    num_rows: int
    num_answered: int
    num_failed: int
    num_scored: int
    score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in numbers; `num_rows` is always `num_answered` + `num_failed`."""

    num_rows: int
    num_answered: int
    num_failed: int

    num_resumed: int
    """How many of the rows were taken over from an earlier run."""

    num_scored: int
    """Answered rows that have answers to compare with."""

    metric: str | None
    """Name of the metric; None where there are no answers to compare with."""

    score: float | None
    """Mean over the scored rows, 0 to 1; None where there are none."""

    score_with_failures: float | None
    """The same mean with each failed row that has answers counted as wrong."""

    families: tuple[FamilySummary, ...]
    """By name, rows without a family last; empty where no row has one."""

    elapsed_s: float
    """Wall-clock time of this run, model loading included."""

    samples_per_s: float | None
    """Rows answered in this run over `elapsed_s`; None where this run answered none."""

    tokens_per_s: float | None
    """Tokens written in this run over `elapsed_s`; prompts are not counted."""

    num_prompt_tokens: int
    num_completion_tokens: int


def summarize(
    rows: Iterable[Row], *, metric: str | None, elapsed_s: float, resumed_ids: Collection[str] = ()
) -> Summary:
    """Count rows, mean their scores and set the work of this run against its time.

    Args:
        rows: All result rows of the selection, those of earlier runs included.
        metric: Name of the metric behind `score`; None drops all scores.
        elapsed_s: Wall-clock time of this run.
        resumed_ids: Ids of rows from an earlier run; they count everywhere but in the rates.
    """
    rows = list(rows)
    resumed = frozenset(resumed_ids)
    answered = [row for row in rows if not _is_failed(row)]
    new = [row for row in answered if row["sample_id"] not in resumed]
    counts = _count(rows, metric)
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(_family_of(row), []).append(row)
    families = (
        FamilySummary(name=name, **_count(by_family[name], metric)) for name in _sorted_families(by_family)
    )
    return Summary(
        **counts,
        num_resumed=sum(row["sample_id"] in resumed for row in rows),
        metric=metric,
        score_with_failures=_score_with_failures(rows, metric),
        families=() if set(by_family) <= {NO_FAMILY} else tuple(families),
        elapsed_s=elapsed_s,
        samples_per_s=_rate(len(new), elapsed_s),
        tokens_per_s=_rate(_sum_tokens(new, "num_completion_tokens"), elapsed_s),
        num_prompt_tokens=_sum_tokens(answered, "num_prompt_tokens"),
        num_completion_tokens=_sum_tokens(answered, "num_completion_tokens"),
    )


def _count(rows: Sequence[Row], metric: str | None) -> dict[str, Any]:
    num_failed = sum(map(_is_failed, rows))
    scores = _scores(rows) if metric is not None else []
    return {
        "num_rows": len(rows),
        "num_answered": len(rows) - num_failed,
        "num_failed": num_failed,
        "num_scored": len(scores),
        "score": _mean(scores, len(scores)),
    }


def _score_with_failures(rows: Sequence[Row], metric: str | None) -> float | None:
    if metric is None:
        return None
    # A failed row without answers would not have been scored, so it is not a wrong answer either.
    # Rows that do not carry their answers are taken to have some.
    num_wrong = sum(_is_failed(row) and ("answers" not in row or bool(_answers(row))) for row in rows)
    scores = _scores(rows)
    return _mean(scores, len(scores) + num_wrong)


def _scores(rows: Iterable[Row]) -> list[float]:
    scores = (_number(row.get("score")) for row in rows if not _is_failed(row))
    return [score for score in scores if score is not None]


def _mean(values: Sequence[float], num_values: int) -> float | None:
    # fsum: the mean does not depend on the order in which workers finished.
    return math.fsum(values) / num_values if num_values else None


def _rate(amount: int, elapsed_s: float) -> float | None:
    return amount / elapsed_s if amount and elapsed_s > 0 else None


def _sum_tokens(rows: Iterable[Row], key: str) -> int:
    return sum(int(_number(row.get(key)) or 0) for row in rows)


# ---------------------------------------------------------------------------------------------
# Errors by cause
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    """Failed rows whose messages differ only in numbers, names or paths."""

    cause: str
    """The message; its varying parts are `…` where the messages of the group differ."""

    example: str
    """The message of the first row."""

    sample_ids: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Count the rows of the group."""
        return len(self.sample_ids)


_VARYING = re.compile(r"0x[0-9a-f]+|'[^']*'|\"[^\"]*\"|(?:[\w.~-]*/)+[\w.~-]*|\d+(?:[.,]\d+)*", re.IGNORECASE)


def group_errors(rows: Iterable[Row]) -> tuple[ErrorGroup, ...]:
    """Group failed rows by cause, the most frequent cause first."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in sorted(filter(_is_failed, rows), key=lambda row: row["sample_id"]):
        sample_id, line = row["sample_id"], _telling_line(str(row["error"]))
        pattern = _VARYING.sub("…", line.replace(sample_id, "…"))
        groups.setdefault(pattern, []).append((sample_id, line))
    found = [
        ErrorGroup(
            cause=pattern if len({line for _, line in members}) > 1 else members[0][1],
            example=members[0][1],
            sample_ids=tuple(sample_id for sample_id, _ in members),
        )
        for pattern, members in groups.items()
    ]
    return tuple(sorted(found, key=lambda group: (-group.num_rows, group.cause)))


def _telling_line(error: str) -> str:
    """Take the line that names the cause: the last one of a traceback, else the first."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no message"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


# ---------------------------------------------------------------------------------------------
# Report: one inference run
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One inference run as the renderers need it."""

    title: str
    """Model and dataset: `Qwen/Qwen2.5-VL-3B-Instruct on chartqa`."""

    summary: Summary
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the run as given; values of secret ones are not shown."""

    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage, in order."""

    errors: tuple[ErrorGroup, ...] = ()
    gallery: tuple[GalleryItem, ...] = ()


def format_table(summary: Summary) -> str:
    """Format the closing table of a run: plain text, at most 80 columns wide."""
    lines = [_family_table(summary, with_total=True).to_text(), ""]
    resumed = f" ({summary.num_resumed:,} resumed)" if summary.num_resumed else ""
    lines.append(
        f"{summary.num_rows:,} rows in{resumed} = {summary.num_answered:,} answered"
        f" + {summary.num_failed:,} failed"
    )
    lines.append(", ".join(f"{fact.value} {fact.label}" for fact in _rate_facts(summary)))
    note = _score_note(summary)
    return "\n".join(lines + ([note] if note else []))


def render_html(report: Report) -> str:
    """Render the run as one HTML page that needs nothing but itself."""
    summary = report.summary
    sections: list[Table | Gallery] = []
    if summary.families:
        sections.append(_family_table(summary))
    if report.stages:
        sections.append(_stage_table(report.stages))
    if report.gallery:
        sections.append(_run_gallery(report))
    if report.errors:
        sections.append(_error_table(report.errors))
    if report.options:
        sections.append(_option_table(report.options))
    return render_page(
        Page(
            title=report.title,
            headline=_headline(summary),
            facts=(*_count_facts(summary), *_rate_facts(summary)),
            sections=tuple(sections),
        )
    )


def render_markdown(report: Report) -> str:
    """Render the run as Markdown: the same tables as the page, without the gallery."""
    summary = report.summary
    headline = _headline(summary)
    facts = [*_count_facts(summary), *_rate_facts(summary)]
    tables = [_family_table(summary, with_total=True)]
    tables += [_stage_table(report.stages)] if report.stages else []
    tables += [_error_table(report.errors)] if report.errors else []
    tables += [_option_table(report.options)] if report.options else []
    blocks = [f"# {_markdown_cell(report.title)}", f"**{headline.value}** {_markdown_cell(headline.label)}"]
    blocks += [_markdown_cell(headline.note)] if headline.note else []
    blocks.append(markdown_table([fact.label for fact in facts], [[fact.value for fact in facts]]))
    for table in tables:
        blocks += [f"## {table.title}", table.to_markdown()]
        blocks += [table.note] if table.note else []
    return "\n\n".join(blocks) + "\n"


def render_json(report: Report) -> str:
    """Render the run's numbers as JSON, without the gallery."""
    content = {
        "title": report.title,
        "summary": asdict(report.summary),
        "stages": dict(report.stages),
        "errors": [{"num_rows": group.num_rows, **asdict(group)} for group in report.errors],
        "options": {name: _hide_secret(name, value) for name, value in report.options.items()},
    }
    return clean_text(json.dumps(content, indent=2, ensure_ascii=False, default=str)) + "\n"


def _family_table(summary: Summary, *, with_total: bool = False) -> Table:
    rows: list[FamilySummary | Summary] = list(summary.families)
    rows += [summary] if with_total else []
    has_score = summary.metric is not None
    columns = [Column("family"), Column("rows", True), Column("answered", True), Column("failed", True)]
    columns += [Column(_short(summary.metric, 24), True)] if summary.metric is not None else []
    return Table(
        title="By family" if summary.families else "Rows",
        columns=tuple(columns),
        rows=tuple(
            (
                row.name if isinstance(row, FamilySummary) else "all",
                f"{row.num_rows:,}",
                f"{row.num_answered:,}",
                f"{row.num_failed:,}",
                *([Cell(format_percent(row.score), row.score)] if has_score else []),
            )
            for row in rows
        ),
    )


def _stage_table(stages: Mapping[str, float]) -> Table:
    longest = max(stages.values())
    return Table(
        title="Time by stage",
        columns=(Column("stage"), Column("time", True)),
        rows=tuple(
            (name, Cell(format_duration(seconds), seconds / longest if longest > 0 else 0.0))
            for name, seconds in stages.items()
        ),
        note="Stages can overlap and run on several workers, so they need not add up to the elapsed time.",
    )


def _error_table(errors: Sequence[ErrorGroup], num_ids: int = 8) -> Table:
    def list_ids(group: ErrorGroup) -> str:
        more = group.num_rows - num_ids
        return ", ".join(group.sample_ids[:num_ids]) + (f" and {more:,} more" if more > 0 else "")

    return Table(
        title="Failed rows by cause",
        columns=(Column("cause"), Column("rows", True), Column("samples")),
        rows=tuple((_short(group.cause, 400), f"{group.num_rows:,}", list_ids(group)) for group in errors),
    )


def _option_table(options: Mapping[str, Any]) -> Table:
    def text_of(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)

    return Table(
        title="Options of this run",
        columns=(Column("option"), Column("value")),
        rows=tuple((name, text_of(_hide_secret(name, value))) for name, value in options.items()),
        collapsed=True,
    )


def _hide_secret(name: str, value: Any) -> Any:
    """Keep credentials out of a page that is made to be passed on."""
    is_secret = re.search(r"(^|[_-])(token|key|password|secret)$", name, re.IGNORECASE) is not None
    return "(hidden)" if is_secret and value else value


def _run_gallery(report: Report) -> Gallery:
    shown, total = len(report.gallery), report.summary.num_rows
    note = f"{shown:,} of {total:,} rows, picked to show what went wrong: their mix is not the score."
    return Gallery(title="Samples", items=report.gallery, note=note if shown < total else "")


def _headline(summary: Summary) -> Fact:
    if summary.metric is None:
        label = f"of {summary.num_rows:,} rows answered; there are no answers to compare with, so no score"
        return Fact(label, f"{summary.num_answered:,}")
    if summary.score is None:
        label = f"of {summary.num_rows:,} rows answered, none of them scored, so no {summary.metric}"
        return Fact(label, f"{summary.num_answered:,}")
    label = f"{summary.metric}, mean over {summary.num_scored:,} scored of {summary.num_rows:,} rows"
    return Fact(label, format_percent(summary.score), _score_note(summary))


def _score_note(summary: Summary) -> str:
    """Say what the score leaves out, where it leaves anything out."""
    notes = []
    if summary.num_failed and summary.score is not None and summary.score_with_failures is not None:
        notes.append(f"{format_percent(summary.score_with_failures)} if failed rows count as wrong.")
    num_unscored = summary.num_answered - summary.num_scored
    if summary.metric is not None and num_unscored:
        notes.append(f"{num_unscored:,} answered without a score.")
    return " ".join(notes)


def _count_facts(summary: Summary) -> list[Fact]:
    resumed = f"{summary.num_resumed:,} from an earlier run" if summary.num_resumed else ""
    return [
        Fact("rows in", f"{summary.num_rows:,}", resumed),
        Fact("answered", f"{summary.num_answered:,}"),
        Fact("failed", f"{summary.num_failed:,}"),
    ]


def _rate_facts(summary: Summary) -> list[Fact]:
    return [
        Fact("samples/s", format_rate(summary.samples_per_s)),
        Fact("tokens/s", format_rate(summary.tokens_per_s)),
        Fact("elapsed", format_duration(summary.elapsed_s)),
    ]
