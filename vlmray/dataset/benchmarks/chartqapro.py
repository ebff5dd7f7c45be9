"""ChartQAPro: dialogues and paragraphs as lmms-eval words them, and how each row is scored.

Question, Answer (lists), Question Type, Year, Paragraph -> ChartQAPro -> Question, Answer (texts), Scoring
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

from vlmray.dataset.benchmarks.layer import Layer
from vlmray.metrics import split_answer

COLUMNS = frozenset({"Question", "Answer", "Question Type", "Year", "Paragraph"})
"""Columns that tell it."""

SCORING = "Scoring"
"""Column that is added: `exact`, `relaxed`, or nothing."""

_WOVEN_IN = ("Year", "Paragraph")
_EXACT_TYPES = ("Fact Checking", "Multi Choice")
_DIALOGUE = "Conversational"


class ChartQAPro(Layer):
    """Its rows, each with the question as it is asked and the answer to that."""

    @property
    def column_names(self) -> Sequence[str]:
        """Names of all columns."""
        return [*(name for name in self.below.column_names if name not in _WOVEN_IN), SCORING]

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Return rows by index."""
        wanted = self.column_names if columns is None else columns
        needed = {*wanted, *COLUMNS} - {SCORING} if {*wanted} & {*COLUMNS, SCORING} else wanted
        rows = self.below.read(indices, list(needed))
        return [_pick({**row, **_read_row(row)} if "Year" in row else row, wanted) for row in rows]


def _pick(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in columns}


def _read_row(row: Mapping[str, Any]) -> dict[str, Any]:
    questions, answers = _texts(row["Question"]), _texts(row["Answer"])
    asked, answer = (texts[-1].strip() if texts else None for texts in (questions, answers))
    if row["Question Type"] == _DIALOGUE and len(questions) > 1:
        turns = zip(questions[:-1], [*answers, *([None] * len(questions))], strict=False)
        lines = [line for number, turn in enumerate(turns, 1) for line in _lines(number, *turn)]
        asked = "\n".join([*lines, f"Q{len(questions)}: {asked}"])
    if paragraph := (row["Paragraph"] or "").strip():
        asked = f"Context: {paragraph}\n\n{asked}"
    scoring = _scoring(row, answer or "")
    return {"Question": asked, "Answer": answer if scoring else None, SCORING: scoring}


def _lines(number: int, question: str, answer: str | None) -> list[str]:
    return [f"Q{number}: {question.strip()}", *([] if answer is None else [f"A{number}: {answer.strip()}"])]


def _scoring(row: Mapping[str, Any], answer: str) -> str | None:
    """Tell by type and year flags, of which there may be one for each place of a list.

    None where they differ within a list, for which there is no metric: the row is answered and not scored.
    """
    flags = [flag.upper() == "YES" for flag in _texts(row["Year"])]
    flags = flags[-1:] if row["Question Type"] == _DIALOGUE else flags
    places = {*islice(cycle(flags), len(split_answer(answer)))}
    if row["Question Type"] in _EXACT_TYPES or places == {True}:
        return "exact"
    return "relaxed" if len(places) < 2 else None


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [str(each) for each in values if each is not None]
