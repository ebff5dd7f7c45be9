"""Errors of many rows as a few groups, and the options of a run, as tables."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmray.reports.tables import Column, Table
from vlmray.reports.text import shorten
from vlmray.schema import Row

NO_FAMILY = "(no family)"


def is_failed(row: Row) -> bool:
    """Tell whether a row has an error in place of an answer."""
    return row.get("error") is not None


# ---------------------------------------------------------------------------------------------
# Errors by cause
# ---------------------------------------------------------------------------------------------


NUM_IDS = 8
"""Samples that are named of those that failed alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    """Failed rows whose messages differ only in numbers, names or paths."""

    cause: str
    """The message; its varying parts are `…` where the messages of the group differ."""

    num_rows: int
    sample_ids: tuple[str, ...]
    """The first few of them."""


_VARYING = re.compile(r"0x[0-9a-f]+|'[^']*'|\"[^\"]*\"|(?:[\w.~-]*/)+[\w.~-]*|\d+(?:[.,]\d+)*", re.IGNORECASE)


@dataclass(slots=True)
class _Cause:
    line: str
    varies: bool = False
    num_rows: int = 0
    sample_ids: list[str] = field(default_factory=list)


class Causes:
    """Causes of errors, counted row by row in any order."""

    def __init__(self) -> None:
        self._causes: dict[str, _Cause] = {}

    def add(self, row: Row) -> None:
        """Count a row if it failed."""
        if not is_failed(row):
            return
        sample_id, line = row["sample_id"], _telling_line(str(row["error"]))
        cause = self._causes.setdefault(_VARYING.sub("…", line.replace(sample_id, "…")), _Cause(line))
        cause.varies |= line != cause.line
        cause.num_rows += 1
        bisect.insort(cause.sample_ids, sample_id)
        del cause.sample_ids[NUM_IDS:]

    def groups(self) -> tuple[ErrorGroup, ...]:
        """Return the failed rows by cause, the most frequent cause first."""
        found = [
            ErrorGroup(
                cause=pattern if cause.varies else cause.line,
                num_rows=cause.num_rows,
                sample_ids=tuple(cause.sample_ids),
            )
            for pattern, cause in self._causes.items()
        ]
        return tuple(sorted(found, key=lambda group: (-group.num_rows, group.cause)))


def group_errors(rows: Iterable[Row]) -> tuple[ErrorGroup, ...]:
    """Group failed rows by cause, the most frequent cause first."""
    causes = Causes()
    for row in rows:
        causes.add(row)
    return causes.groups()


def _telling_line(error: str) -> str:
    """Take the line that names the cause: the last one of a traceback, else the first."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no message"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def error_table(errors: Sequence[ErrorGroup]) -> Table:
    """List causes with how many rows they hit, and the first few of these."""

    def list_ids(group: ErrorGroup) -> str:
        more = group.num_rows - len(group.sample_ids)
        return ", ".join(group.sample_ids) + (f" and {more:,} more" if more else "")

    return Table(
        title="Failed rows by cause",
        columns=(Column("cause"), Column("rows", True), Column("samples")),
        rows=tuple((shorten(group.cause, 400), f"{group.num_rows:,}", list_ids(group)) for group in errors),
    )


def option_table(options: Mapping[str, Any]) -> Table:
    """List options, folded away; values of secret ones are hidden."""

    def text_of(value: Any) -> str:
        if value is None:
            return "–"
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
