"""A row of a dataset as a `Sample`."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.text.values import as_text, check_text, name_kind, parse_json
from vlmray.schema import Sample

_MARKER = re.compile(r"<\|?image(?:[ _-]?(?:\d+|placeholder|token))?\|?>|<ImageHere>", re.IGNORECASE)
"""What rows of other tools have in a question where its image belongs."""


def to_sample(row: Mapping[str, Any], spec: DatasetSpec, sample_id: str) -> Sample:
    """Read one row in the dataset's terms as a `Sample` in ours.

    An empty question or a broken image is not judged here: it becomes an error record later.

    Raises:
        ValueError: the row holds several images, or none although its dataset is about images; or something
            that is no text where one belongs.
    """
    choices = _choices(row, spec.choices_column) if spec.choices_column else ()
    answers = read_texts(row[spec.answer_column]) if spec.answer_column else ()
    if choices:
        answers = tuple(name for answer in answers for name in _as_choice(answer, choices))
    family = row[spec.family_column] if spec.family_column else None
    family = ", ".join(read_texts(family)) if isinstance(family, list) else _text(family)
    image = _image(row[spec.image_column]) if spec.image_column else None
    if spec.image_column and image is None and not spec.image_optional:
        raise ValueError(f"no image in column {spec.image_column!r}")
    question = _question(row[spec.question_column])
    return Sample(
        sample_id=sample_id,
        question=question if image is None else _without_marker(question, choices),
        answers=answers,
        image=image,
        choices=choices,
        family=None if family is None else spec.family_names.get(family, family),
    )


def read_texts(value: Any) -> tuple[str, ...]:
    """Flatten the shapes in which datasets keep answers: a value, a list, a list of {"answer": ...}.

    Raises:
        ValueError: it has another shape, or a text in it is not UTF-8.
    """
    if isinstance(value, Mapping):
        key = next((key for key in ("answer", "text") if key in value), None)
        if key is None:
            raise ValueError(f"expected texts, a list of them, or one under 'answer'; got {name_kind(value)}")
        return read_texts(value[key])
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(text for item in value for text in read_texts(item))
    text = _text(value)
    return () if text is None else (text,)


def marker_in(question: str) -> str | None:
    """Return what a question has in the place of its image, if it has such a mark."""
    found = _MARKER.search(question)
    return found and found[0]


def _question(value: Any) -> str:
    try:
        return _text(value) or ""
    except ValueError as error:
        raise ValueError(f"the question is no text: {error}") from error


def _without_marker(question: str, choices: Sequence[str]) -> str:
    """Take away the marker before or after a question; its image comes first anyway."""
    found = _MARKER.findall("\n".join([question, *choices]))
    if not found:
        return question
    inner = question.strip()
    rest = _MARKER.sub("", question).strip()
    if len(found) == 1 and _MARKER.search(question) and (inner.startswith(rest) or inner.endswith(rest)):
        return rest
    raise ValueError(
        f"the question has {found[0]!r} inside of its text or more than once; "
        "it may stand before or after the text, for the one image that a question can have"
    )


def _text(value: Any) -> str | None:
    text = as_text(value)
    return None if text is None else check_text(text)


def _choices(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """Read the choices: a list in one column, or a column for each, of which the last ones may be empty."""
    if column in row:
        return read_texts(_as_list(row[column]))
    found = [_text(row[name]) or "" for name in split_columns(column)]
    while found and not found[-1]:
        found.pop()
    if "" in found:
        raise ValueError(f"no choice {string.ascii_uppercase[found.index('')]}, but one after it")
    return tuple(found)


def split_columns(names: str) -> list[str]:
    """Split names of columns at commas."""
    return [name.strip() for name in names.split(",")]


def _as_list(value: Any) -> Any:
    """Read a list that is written as text, as CSV files and MMMU have them."""
    if not isinstance(value, str):
        return value
    for read in (parse_json, ast.literal_eval):
        try:
            found = read(value.strip())
        except (ValueError, SyntaxError):
            continue
        if isinstance(found, list):
            return found
    raise ValueError(f"expected a list of choices, got the text {value[:60]!r}")


def _as_choice(answer: str, choices: Sequence[str]) -> tuple[str, ...]:
    """Turn the index of a choice into its letter; before the text of a choice, put its letter."""
    letters = string.ascii_uppercase[: len(choices)]
    if answer in tuple(letters):
        return (answer,)
    if answer.isdecimal() and int(answer) < len(letters):
        return (letters[int(answer)],)
    return next(
        ((letter, answer) for letter, text in zip(letters, choices, strict=False) if text == answer),
        (answer,),
    )


def _image(value: Any) -> bytes | str | None:
    if isinstance(value, list):
        if len(value) > 1:
            raise ValueError(f"the row has {len(value)} images; one a question is supported")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        # Empty bytes are a broken image, not a missing one: only None falls through to the path.
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    image: bytes | str | None = value
    return image
