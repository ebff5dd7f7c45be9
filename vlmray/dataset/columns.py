"""Which columns of a dataset mean what: as registered, as usual, or as the options say.

column names, first rows -> get_dataset_columns -> DatasetSpec

What is not understood is refused: images in a column that was not recognised, a question that is no text,
choices that the prompt asks for and that are nowhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmray.dataset.chat.conversations import is_conversation
from vlmray.dataset.chat.marks import find_mark
from vlmray.dataset.chat.requests import REQUEST_COLUMNS
from vlmray.dataset.images import image_kind
from vlmray.dataset.registry import DATASETS, TELLTALES, DatasetSpec, split_columns
from vlmray.dataset.text.values import name_kind
from vlmray.errors import OptionError

NO_COLUMN = "none"
"""What `--image_column` is given where a dataset has images that are not to be used."""

Rows = Sequence[Mapping[str, Any]]

_CONVERSATIONS = ("messages", "conversations", "conversation")

# What people call these columns, tried in this order for a dataset that nobody registered.
_USUAL_COLUMNS = {
    "question_column": ("question", "query", "problem", *_CONVERSATIONS, "prompt", "text"),
    "image_column": ("image", "image_path", "image_url", "img", "picture", "images"),
    "answer_column": ("answers", "answer", "label", "solution", "response"),
}


def get_dataset_columns(
    dataset_name: str,
    column_names: Sequence[str],
    *,
    dataset_config: str | None = None,
    first_rows: Callable[[], Rows] = list,
    **overrides: str | None,
) -> DatasetSpec:
    """Decide which columns mean what.

    A registered name decides; else what tells a copy of a registered dataset (ChartQA in a local folder is
    ChartQA); else the usual column names. Options win over all of these.

    Args:
        dataset_name: Name on the hub, path, or `charts`.
        column_names: Columns the dataset has.
        dataset_config: Configuration of the dataset.
        first_rows: Reads some rows, for what names do not tell; it is not called for a registered name.
        **overrides: Fields of `DatasetSpec` that the user set; None where not, "none" for no image column.

    Raises:
        ValueError: a column is missing, no question column could be told, or columns hold what is not
            understood.
    """
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    if given.get("image_column") == NO_COLUMN and NO_COLUMN not in column_names:
        given["image_column"] = None
    known = _registered(dataset_name, dataset_config)
    rows = [] if known else first_rows()
    known = known or _copied(column_names, rows)
    spec = dataclasses.replace(known or _guess(column_names, given, rows), **given, **_replaced_by(given))
    if spec.form != "conversation" and spec.system_column:
        raise OptionError("system_column", "is for rows that bring a conversation", "pass --system_prompt")
    for option, column in spec.columns().items():
        names = split_columns(column) if option in ("choices_column", "image_column") else [column]
        for name in [] if column in column_names else names:
            if name not in column_names:
                hint = f"it has {', '.join(column_names)}"
                raise OptionError(option, f": {dataset_name} has no column {name!r}", hint)
    if known is None and "image_column" not in given:
        _check_images(spec, rows)
    return spec


def _replaced_by(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a registered dataset does not hold any more once its prompt or metric was chosen."""
    found = {"open_prompt_template": "prompt_template", "row_metrics": "metric", "metric_column": "metric"}
    return {name: None for name, option in found.items() if option in given}


def _registered(name: str, config: str | None) -> DatasetSpec | None:
    name = name.partition("?")[0]
    return DATASETS.get(f"{name}#{config}") or DATASETS.get(name)


def _copied(column_names: Sequence[str], rows: Rows) -> DatasetSpec | None:
    """Return what a registered dataset is known as, if this is a copy: common names alone tell nothing."""
    return next(
        (
            spec
            for name, spec in DATASETS.items()
            if set(spec.columns().values()) <= set(column_names)
            and (TELLTALES.get(name, ()) or _has_families(spec, rows))
            and set(TELLTALES.get(name, ())) <= set(column_names)
        ),
        None,
    )


def _has_families(spec: DatasetSpec, rows: Rows) -> bool:
    """Tell whether rows are of the families that a dataset has names for."""
    known = {*spec.family_names, *spec.family_names.values()}
    return bool(known and rows) and all(str(row[spec.family_column or ""]) in known for row in rows)


def _guess(column_names: Sequence[str], given: Mapping[str, str], rows: Rows) -> DatasetSpec:
    def is_meant(name: str) -> bool:
        return name not in _CONVERSATIONS or any(is_conversation(row.get(name)) for row in rows)

    columns = {
        option: next((name for name in usual if name in column_names and is_meant(name)), None)
        for option, usual in _USUAL_COLUMNS.items()
    }
    if {*column_names} >= REQUEST_COLUMNS and "question_column" not in given:
        return DatasetSpec(question_column="body", form="request")
    question = given.get("question_column") or columns["question_column"]
    if question is None:
        raise OptionError(
            "question_column", f"is needed: none of the columns {', '.join(column_names)} looks like one"
        )
    if question in column_names and any(is_conversation(row[question]) for row in rows):
        return DatasetSpec(
            question_column=question,
            image_column=columns["image_column"],
            answer_column="completion" if "completion" in column_names else None,
            system_column="system" if "system" in column_names else None,
            form="conversation",
        )
    return DatasetSpec(
        question_column=question,
        image_column=columns["image_column"],
        answer_column=columns["answer_column"],
    )


def _check_images(spec: DatasetSpec, rows: Rows) -> None:
    """Refuse a dataset with images that would not be used, unless the user chose its image column."""
    kinds = {name: _kind_of_column(name, rows) for name in (rows[0] if rows else ())}
    taken = spec.image_column
    others = [name for name, kind in kinds.items() if kind and name not in spec.columns().values()]
    if taken is None and others:
        raise OptionError(
            "image_column",
            f"is needed: {_enumerate(others)} {'holds' if len(others) == 1 else 'hold'} images, "
            "and no column of a usual name does",
            f"pass --image_column {others[0]}, or --image_column {NO_COLUMN} to ask without images",
        )
    rivals = [name for name in others if kinds[name] == kinds[taken or ""] and not _same(taken, name, rows)]
    if rivals:
        raise OptionError(
            "image_column",
            f"is needed: {_enumerate([str(taken), *rivals])} hold images",
            f"pass --image_column {','.join([str(taken), *rivals])} to show all of them, or {taken} alone",
        )


def _kind_of_column(name: str, rows: Rows) -> str | None:
    return next((kind for row in rows if (kind := image_kind(row[name], name))), None)


def _same(taken: str | None, other: str, rows: Rows) -> bool:
    """Tell whether two columns say the same of an image, as its path and its name do."""
    pairs = [(row[taken or ""], row[other]) for row in rows]
    return all(
        a == b or (isinstance(a, str) and isinstance(b, str) and Path(a).name == Path(b).name)
        for a, b in pairs
        if a is not None and b is not None
    )


def _enumerate(names: Sequence[str]) -> str:
    return f"column {names[0]!r}" if len(names) == 1 else f"columns {', '.join(map(repr, names))}"


def check_questions(spec: DatasetSpec, rows: Rows, *, without_images: bool = False) -> None:
    """Refuse a question column whose first rows are not understood.

    Args:
        spec: Names the column.
        rows: Some rows.
        without_images: The user said that there are none.

    Raises:
        ValueError: they hold lists or structures, or marks for images that no column has.
    """
    column = spec.question_column
    for row in rows if spec.form != "request" else ():
        question = "" if is_conversation(row[column]) else str(row[column]).strip()
        mark = "" if spec.image_column or without_images else find_mark(question)
        if mark and (question.startswith(mark) or question.endswith(mark)):
            raise OptionError(
                "image_column",
                f"is needed: questions begin or end with {mark!r}, and no column looks like images",
                f"pass it, or --image_column {NO_COLUMN} to ask without images",
            )
        if isinstance(row[column], list | tuple | Mapping) and not is_conversation(row[column]):
            raise OptionError(
                "question_column",
                f": {column!r} holds {name_kind(row[column])}, and a question is a text",
                'write a row for each question, or conversations of {"role", "content"} turns',
            )


def check_choices(spec: DatasetSpec, column_names: Sequence[str]) -> None:
    """Refuse a prompt with a place for choices where there are none.

    Raises:
        ValueError: so it is.
    """
    if "{choices}" in spec.prompt_template and spec.choices_column is None:
        raise OptionError(
            "prompt_template",
            "has {choices}, and no column is taken for them",
            f"pass --choices_column, as one or several of {', '.join(column_names)}",
        )
