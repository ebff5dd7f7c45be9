"""Rows of one call of the engine: which are asked, and whose answers the others take over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from vlmray.inference.result_folder import pick
from vlmray.inference.reuse.answers import Known
from vlmray.inference.reuse.folder import COLUMNS, Answer
from vlmray.schema import Row


@contextlib.contextmanager
def taking_over(
    rows: Sequence[Row], key_of: Callable[[Row], bytes | None], known: Known | None
) -> Iterator[Sequence[Row]]:
    """Yield the rows that have to be asked; once they are answered, so are the others.

    Args:
        rows: Rows without answers.
        key_of: Tells what the answer to a row depends on; None: it is that row's alone.
        known: Knows answers, and learns those that are new; None: every row is asked.
    """
    if known is None:
        yield rows
        return
    keys = [key_of(row) for row in rows]
    found = known.find(wanted) if (wanted := {key for key in keys if key is not None}) else {}
    asked: list[Row] = []
    firsts: dict[bytes, Row] = {}
    twins: list[tuple[Row, Row]] = []
    for row, key in zip(rows, keys, strict=True):
        if key is None:
            asked.append(row)
        elif each := found.get(key):
            give(row, each.answer, is_of_run=each.is_of_run)
        elif first := firsts.get(key):
            twins.append((row, first))
        else:
            firsts[key] = row
            asked.append(row)
    yield asked
    for row, first in twins:
        give_twin(row, first)
    if new := answers_of(firsts):
        known.keep(new)


def give(row: Row, answer: Answer, *, is_of_run: bool) -> None:
    """Give a row an answer that is known."""
    row |= cast(Any, answer._asdict()) | {"error": None, "taken_from": "run" if is_of_run else "cache"}


def give_twin(row: Row, first: Row) -> None:
    """Give a row what another one was answered that asks the same, be it an error."""
    row |= pick(first, (*COLUMNS, "error")) | {"taken_from": "run"}


def answers_of(rows: dict[bytes, Row]) -> dict[bytes, Answer]:
    """Return what may be taken over of answered rows: no errors, which another time may not be."""
    return {key: Answer.of(row) for key, row in rows.items() if row["error"] is None}
