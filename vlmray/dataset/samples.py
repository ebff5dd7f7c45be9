"""A row of a dataset as a `Sample`."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from vlmray.dataset.registry import DatasetSpec
from vlmray.schema import Sample


def to_sample(row: Mapping[str, Any], spec: DatasetSpec, sample_id: str) -> Sample:
    """Read one row in the dataset's terms as a `Sample` in ours.

    An empty question or a broken image is not judged here: it becomes an error record later.

    Raises:
        ValueError: the row holds several images, or none although its dataset is about images.
    """
    choices = _texts(row[spec.choices_column]) if spec.choices_column else ()
    answers = _texts(row[spec.answer_column]) if spec.answer_column else ()
    if choices:
        answers = tuple(name for answer in answers for name in _as_choice(answer, choices))
    family = row[spec.family_column] if spec.family_column else None
    if isinstance(family, list):
        family = ", ".join(map(str, family))
    question = row[spec.question_column]
    image = _image(row[spec.image_column]) if spec.image_column else None
    if spec.image_column and image is None and not spec.image_optional:
        raise ValueError(f"no image in column {spec.image_column!r}")
    return Sample(
        sample_id=sample_id,
        question="" if question is None else str(question),
        answers=answers,
        image=image,
        choices=choices,
        family=None if family is None else spec.family_names.get(str(family), str(family)),
    )


def _texts(value: Any) -> tuple[str, ...]:
    """Flatten the shapes in which datasets keep answers: a value, a list, a list of {"answer": ...}."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return _texts(value.get("answer", value.get("text")))
    if hasattr(value, "tolist"):  # a NumPy array or number
        value = value.tolist()
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in _texts(item))
    return (str(value),)


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
