"""A row of a dataset as a `Sample`."""

from __future__ import annotations

import ast
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmray.dataset.chat.conversations import is_conversation, read_conversation
from vlmray.dataset.chat.marks import NO_VIDEO, choose_images, count_marks, without_outer_mark
from vlmray.dataset.chat.requests import read_request_row
from vlmray.dataset.registry import DatasetSpec, split_columns
from vlmray.dataset.text.values import as_text, check_text, name_kind, parse_json
from vlmray.schema import Sample, text_of

_VIDEOS = ("video", "videos", "video_path", "video_url")


def to_sample(row: Mapping[str, Any], spec: DatasetSpec, sample_id: str) -> Sample:
    """Read one row in the dataset's terms as a `Sample` in ours.

    An empty question or a broken image is not judged here: it becomes an error record later.

    Raises:
        ValueError: the row holds no image although its dataset is about images, or something that is no text
            where one belongs.
    """
    if spec.form == "request":
        return read_request_row(row, sample_id)
    images = [image for name in spec.image_columns for image in read_images(row[name])]
    conversation = is_conversation(row[spec.question_column])
    if (conversation or not images) and any(row.get(name) for name in _VIDEOS):
        raise ValueError(NO_VIDEO)
    if conversation:
        return _from_conversation(row, images, spec, sample_id)
    choices = _choices(row, spec.choices_column) if spec.choices_column else ()
    answers = read_texts(row[spec.answer_column]) if spec.answer_column else ()
    if choices:
        answers = tuple(name for answer in answers for name in _as_choice(answer, choices))
    if spec.image_column and not images and not spec.image_optional:
        raise ValueError(f"no image in column {spec.image_column!r}")
    question = _question(row[spec.question_column])
    texts = spec.in_order_of_prompt(question, choices)
    if len(images) == 1 and count_marks("\n".join(texts)) == 1:
        question = without_outer_mark(question)
    return Sample(
        sample_id=sample_id,
        question=question,
        answers=answers,
        images=choose_images(texts, images),
        choices=choices,
        metric=(spec.row_metrics or {}).get(str(row.get(spec.metric_column or ""))),
        family=_family(row, spec),
    )


def _from_conversation(
    row: Mapping[str, Any], images: Sequence[bytes | str], spec: DatasetSpec, sample_id: str
) -> Sample:
    """Read a row whose question is the last user turn of a conversation, and a turn after it the answer."""
    messages, images = read_conversation(
        row[spec.question_column], images,
        system=_text(row[spec.system_column]) if spec.system_column else None,
        has_marks=spec.image_column is not None,
    )  # fmt: skip
    answers: tuple[str, ...] = ()
    if messages[-1]["role"] == "assistant":
        answers = (text_of(messages.pop()),)
    if not messages or messages[-1]["role"] != "user":
        found = f"ends with a turn of role {messages[-1]['role']}" if messages else "has no turn before it"
        raise ValueError(f"the conversation asks nothing: its last answer aside, it {found}")
    return Sample(
        sample_id=sample_id,
        question=text_of(messages[-1]),
        answers=read_texts(row[spec.answer_column]) if spec.answer_column else answers,
        images=tuple(images),
        messages=tuple(messages),
        family=_family(row, spec),
    )


def _family(row: Mapping[str, Any], spec: DatasetSpec) -> str | None:
    family = row[spec.family_column] if spec.family_column else None
    family = ", ".join(read_texts(family)) if isinstance(family, list) else _text(family)
    return None if family is None else spec.family_names.get(family, family)


def read_texts(value: Any) -> tuple[str, ...]:
    """Flatten the shapes in which datasets keep answers: a value, a list, a list of {"answer": ...}.

    Raises:
        ValueError: it has another shape, or a text in it is not UTF-8.
    """
    if is_conversation(value):  # as TRL's `completion`
        return tuple(map(text_of, read_conversation(value).messages))
    if isinstance(value, Mapping):
        key = next((key for key in ("answer", "text") if key in value), None)
        if key is None:
            raise ValueError(f"expected texts, a list of them, or one under 'answer'; got {name_kind(value)}")
        return read_texts(value[key])
    if isinstance(value, list | tuple | np.ndarray):
        return tuple(text for item in value for text in read_texts(item))
    text = _text(value)
    return () if text is None else (text,)


def _question(value: Any) -> str:
    try:
        return _text(value) or ""
    except ValueError as error:
        raise ValueError(f"the question is no text: {error}") from error


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


def read_images(value: Any) -> list[bytes | str]:
    """Flatten the shapes in which datasets keep images: a value, `{"bytes", "path"}`, a list of these."""
    if isinstance(value, list):
        return [image for item in value for image in read_images(item)]
    if isinstance(value, Mapping):
        # Empty bytes are a broken image, not a missing one: only None falls through to the path.
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    return [] if value is None else [value]
