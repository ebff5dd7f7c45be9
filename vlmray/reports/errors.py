"""Errors of many rows as a few groups, and the options of a run, as tables."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmray.reports.gallery import Row
from vlmray.reports.tables import Column, Table
from vlmray.reports.text import shorten

NO_FAMILY = "(no family)"


def is_failed(row: Row) -> bool:
    return row.get("error") is not None


# ---------------------------------------------------------------------------------------------
# Errors by cause
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorGroup:
    """Failed rows whose messages differ only in numbers, names or paths."""

    cause: str
    """The message; its varying parts are `…` where the messages of the group differ."""

    sample_ids: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Count the rows of the group."""
        return len(self.sample_ids)


_VARYING = re.compile(r"0x[0-9a-f]+|'[^']*'|\"[^\"]*\"|(?:[\w.~-]*/)+[\w.~-]*|\d+(?:[.,]\d+)*", re.IGNORECASE)


def group_errors(rows: Iterable[Row]) -> tuple[ErrorGroup, ...]:
    """Group failed rows by cause, the most frequent cause first."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in sorted(filter(is_failed, rows), key=lambda row: row["sample_id"]):
        sample_id, line = row["sample_id"], _telling_line(str(row["error"]))
        pattern = _VARYING.sub("…", line.replace(sample_id, "…"))
        groups.setdefault(pattern, []).append((sample_id, line))
    found = [
        ErrorGroup(
            cause=pattern if len({line for _, line in members}) > 1 else members[0][1],
            sample_ids=tuple(sample_id for sample_id, _ in members),
        )
        for pattern, members in groups.items()
    ]
    return tuple(sorted(found, key=lambda group: (-group.num_rows, group.cause)))


def _telling_line(error: str) -> str:
    """Take the line that names the cause: the last one of a traceback, else the first."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["no message"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def error_table(errors: Sequence[ErrorGroup], num_ids: int = 8) -> Table:
    """List causes with how many rows they hit, and the first few of these."""

    def list_ids(group: ErrorGroup) -> str:
        more = group.num_rows - num_ids
        return ", ".join(group.sample_ids[:num_ids]) + (f" and {more:,} more" if more > 0 else "")

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
