"""Training samples: questions and answers about one image, as the chat that the model is to learn.

    rows -> group_turns -> Conversations.read -> open_images -> to_feature -> the collator
                           messages, image bytes  pixels         PIL images

The questions are worded exactly as inference words them. A sample whose image is broken or whose answer
is missing gets an `error`, travels on untouched and is counted in the end. No Ray here, and no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, overload

import numpy as np
import pyarrow as pa
from PIL import Image

from vlmray.dataset.chat.marks import count_marks
from vlmray.dataset.prompts import format_data
from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.rows import fetch_images, image_columns, read_rows, to_question
from vlmray.dataset.samples import read_texts, to_sample
from vlmray.dataset.slices import sample_id
from vlmray.dataset.sources import Source
from vlmray.errors import OptionError
from vlmray.images.decoding import decode_image, image_size
from vlmray.schema import GenerationRequest, Row

Feature = Mapping[str, Any]
"""A sample as the collator takes it: `sample_id`, and `messages` with `images`, or `error`. `answer` is the
place of the turn that the sample's answers are about."""

Features = Sequence[Feature | None]
"""Samples of a batch; None is an empty slot."""

SAMPLE_SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
        "family": pa.string(),
        "choices": pa.list_(pa.string()),
        "own_metric": pa.string(),
        "conversation": pa.string(),
        "messages": pa.string(),
        "images": pa.list_(pa.large_binary()),
        "image_urls": pa.list_(pa.string()),
        "pixels": pa.list_(pa.large_binary()),
        "sizes": pa.list_(pa.list_(pa.int32())),
        "error": pa.string(),
    }
)
"""Columns of a sample on its way to a training worker; a row without a sample_id is an empty slot."""


class SampleRow(Row, total=False):
    """A sample on its way to a training worker: the first of its rows, all their turns as messages."""

    pixels: list[bytes]
    """Of each image: RGB, row by row."""

    sizes: list[list[int]]
    """Width and height of each image."""


_NO_IMAGE: tuple[Any, ...] = (None, [], {"bytes": None, "path": None})
_KEPT = ("sample_id", "question", "answers", "family", "choices", "own_metric")
_ROWS_PER_READ = 256
_CHARS_PER_TOKEN, _PIXELS_PER_TOKEN = 4, 28 * 28  # Qwen2.5-VL's, and good enough for others


class Turns(Sequence[Sequence[int]]):
    """The rows that each sample asks, in two arrays: millions of them reach a task without being unpacked.

    Args:
        samples: For each sample its rows.
    """

    def __init__(self, samples: Iterable[Sequence[int]]) -> None:
        lengths, rows = array("q"), array("q")
        for sample in samples:
            lengths.append(len(sample))
            rows.extend(sample)
        self._rows = np.frombuffer(rows, dtype=np.int64)
        self._ends = np.cumsum(np.frombuffer(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Sequence[int]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[int]]: ...

    def __getitem__(self, index: int | slice) -> Sequence[int] | Sequence[Sequence[int]]:
        if isinstance(index, slice):
            return Turns(self[at] for at in range(*index.indices(len(self))))
        at = range(len(self))[index]
        return self._rows[self._ends[at - 1] if at else 0 : self._ends[at]].tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations:
    """Samples of one split, addressed by number."""

    source: Source
    spec: DatasetSpec
    split: str
    system_prompt: str | None = None

    turns: Sequence[Sequence[int]]
    """For each sample the rows it asks: several only where they are about one image."""

    def __len__(self) -> int:
        return len(self.turns)

    def read(self, samples: Sequence[int | None]) -> list[SampleRow]:
        """Read samples, images still encoded; None gives an empty slot."""
        wanted = [row for sample in samples if sample is not None for row in self.turns[sample]]
        rows = iter(read_rows(self.source, self.spec, self.split, wanted))
        return [
            {} if sample is None else self._join([next(rows) for _ in self.turns[sample]])
            for sample in samples
        ]

    def _join(self, rows: Sequence[Row]) -> SampleRow:
        """Make one sample of rows that ask about one image; the first row names it."""
        sample = cast(SampleRow, {name: rows[0].get(name) for name in SAMPLE_SCHEMA.names})
        sample["error"] = next((row["error"] for row in rows if row["error"] is not None), None)
        if sample["error"] is None:
            try:
                messages = [message for turn, row in enumerate(rows) for message in self._turn(row, turn)]
                sample["messages"] = json.dumps(messages, ensure_ascii=False)
            except ValueError as error:
                sample["error"] = str(error)
        return sample

    def _turn(self, row: Row, turn: int) -> list[dict[str, Any]]:
        """Word one question and its answer; the image and the system prompt come with the first."""
        sample = to_question(row)
        if turn and count_marks(sample.question):
            raise ValueError("a question with a place for an image cannot follow another; use --max_turns 1")
        return format_data(
            sample if turn == 0 else replace(sample, images=()),
            system_prompt=self.system_prompt if turn == 0 else None,
            prompt_template=self.spec.template_of(sample.choices),
            with_answer=True,
        )


def group_turns(source: Source, spec: DatasetSpec, selected: Sequence[int], max_turns: int) -> Turns:
    """Group consecutive rows about one image into samples of at most `max_turns` rows.

    Args:
        source: Where the rows are.
        spec: Names the image column.
        selected: Rows to train on.
        max_turns: 1 makes every row a sample of its own, and reads nothing.
    """
    if max_turns == 1:
        return Turns((index,) for index in selected)
    return Turns(_group(source, spec, selected, max_turns))


def _group(
    source: Source, spec: DatasetSpec, selected: Sequence[int], max_turns: int
) -> Iterator[Sequence[int]]:
    group: list[int] = []
    last = None
    for index, image in zip(selected, _images(source, spec, selected), strict=True):
        if group and (image is None or image != last or len(group) == max_turns):
            yield group
            group = []
        group.append(index)
        last = image
    yield group


def _images(source: Source, spec: DatasetSpec, selected: Sequence[int]) -> Iterator[Any]:
    """Yield what tells the image of each row from others."""
    columns = image_columns(source, spec)
    for start in range(0, len(selected), _ROWS_PER_READ):
        indices = selected[start : start + _ROWS_PER_READ]
        if not columns:
            yield from (None for _ in indices)
        for row in source.read(indices, columns) if columns else ():
            images = [image for image in row.values() if image not in _NO_IMAGE]
            yield images or None


def estimate_lengths(samples: Conversations, max_pixels: int | None = None) -> Sequence[int]:
    """Estimate the tokens of all samples by their texts and the sizes of their images, well enough to sort.

    Args:
        samples: They are read once; images keep encoded, and those given by URL are left where they are.
        max_pixels: Largest image area after resizing, where one is set.
    """
    lengths = array("l")
    for start in range(0, len(samples), _ROWS_PER_READ):
        for row in samples.read(range(start, min(start + _ROWS_PER_READ, len(samples)))):
            areas = [min(_area(image), max_pixels or sys.maxsize) for image in row["images"] or ()]
            lengths.append(len(row["messages"] or "") // _CHARS_PER_TOKEN + sum(areas) // _PIXELS_PER_TOKEN)
    return lengths


def _area(image: bytes | None) -> int:
    """Return width times height of an image; 0 where it is not here, or broken."""
    try:
        return math.prod(image_size(image)) if image else 0
    except ValueError:
        return 0


def check_answers(source: Source, spec: DatasetSpec, split: str, selected: Sequence[int]) -> None:
    """Check that there is something to learn.

    Raises:
        ValueError: no answer column is known, or no selected row has an answer in it.
    """
    if spec.form and _brings_answer(source, spec, split, selected):
        return
    if spec.answer_column is None:
        raise OptionError(
            "answer_column", "is needed to train", f"the columns are {', '.join(source.column_names)}"
        )
    problem = f"all {len(selected)} selected rows of split {split!r} have an empty {spec.answer_column!r}"
    for start in range(0, len(selected), _ROWS_PER_READ):
        for row in source.read(selected[start : start + _ROWS_PER_READ], [spec.answer_column]):
            try:
                if any(answer.strip() for answer in read_texts(row[spec.answer_column])):
                    return
            except ValueError as error:
                problem = f"no selected row has an answer in {spec.answer_column!r} ({error})"
    hint = "there is nothing to learn from them, or to compare with"
    raise OptionError("answer_column", f": {problem}", hint)


def _brings_answer(source: Source, spec: DatasetSpec, split: str, selected: Sequence[int]) -> bool:
    """Tell whether a conversation ends with an answer."""
    for index in selected:
        with contextlib.suppress(ValueError):
            (row,) = source.read([index])
            if any(answer.strip() for answer in to_sample(row, spec, sample_id(split, index)).answers):
                return True
    return False


def open_images(rows: Sequence[SampleRow]) -> list[SampleRow]:
    """Fetch and decode the images of samples: their pixels take the place of the encoded bytes."""
    asked = [row for row in rows if row.get("sample_id") and row["error"] is None]
    fetch_images(asked)
    for row in asked:
        images = row.pop("images")
        try:
            pictures = [decode_image(image) for image in images if image and row["error"] is None]
        except ValueError as error:
            row["error"] = str(error)
        else:
            row["pixels"] = [picture.tobytes() for picture in pictures]
            row["sizes"] = [list(picture.size) for picture in pictures]
    return list(rows)


def to_feature(row: SampleRow) -> Feature | None:
    """Turn a sample into what the collator takes: messages with their images; None for an empty slot."""
    if not row.get("sample_id"):
        return None
    feature = {name: row.get(name) for name in _KEPT}
    if row["error"] is not None:
        return {**feature, "error": row["error"]}
    messages = row["messages"]
    assert messages is not None
    images = [
        Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
        for pixels, (width, height) in zip(row["pixels"], row["sizes"], strict=True)
    ]
    turns = json.loads(messages)
    places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    answer = places[-1] if row.get("conversation") else places[0]
    return {**feature, "messages": turns, "images": images, "answer": answer}


def first_question(feature: Feature, max_new_tokens: int) -> GenerationRequest:
    """Make the request that a sample's answers are to: its first question, or the last of a conversation."""
    messages = feature["messages"][: feature["answer"]]
    num_images = sum(part["type"] == "image" for message in messages for part in message["content"])
    return GenerationRequest(
        request_id=feature["sample_id"],
        messages=messages,
        images=list(feature["images"][:num_images]),
        max_new_tokens=max_new_tokens,
    )
