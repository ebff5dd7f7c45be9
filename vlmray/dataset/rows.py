"""Rows of a source as the values that travel: asked, with the image as encoded bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.samples import read_texts, to_sample
from vlmray.dataset.slices import sample_id
from vlmray.dataset.sources import Source
from vlmray.dataset.text.values import printable
from vlmray.images.decoding import ImageError
from vlmray.images.reading import read_image_bytes
from vlmray.schema import Row, Sample

_NUM_FETCHES = 16


def read_chunk(
    source: Source, spec: DatasetSpec, split: str, selected: Sequence[int], start: int, stop: int
) -> list[Row]:
    """Read the rows of `selected[start:stop]`, moved so that no run of rows with one image is cut.

    A border that falls inside a run moves to the run's end, by one chunk at most. Both neighbours of
    a border compute the same move from the data alone, so every row is read exactly once.
    """
    reach = stop - start
    begin = _run_end(source, spec, selected, start, reach)
    end = _run_end(source, spec, selected, stop, reach)
    return read_rows(source, spec, split, selected[begin:end])


def read_rows(source: Source, spec: DatasetSpec, split: str, indices: Sequence[int]) -> list[Row]:
    """Read rows by index; a row that cannot be read as a sample has an `error`."""
    return [
        _read_row(row, source, spec, split, index)
        for row, index in zip(source.read(indices), indices, strict=True)
    ]


def read_image(source: Source, spec: DatasetSpec, split: str, index: int) -> bytes | None:
    """Read the image of a row, still encoded; None where it has none, or only a URL."""
    (row,) = read_rows(source, spec, split, [index])
    return row.get("image")


def _run_end(source: Source, spec: DatasetSpec, selected: Sequence[int], border: int, reach: int) -> int:
    column = source.same_image_column or spec.image_column
    if column is None or not 0 < border < len(selected):
        return min(border, len(selected))

    def image(position: int) -> Any:
        return source.read([selected[position]], [column])[0][column]

    last = image(border - 1)
    if last is None:
        return border  # rows without an image have none in common
    farthest = min(border + reach, len(selected))
    return next((at for at in range(border, farthest) if image(at) != last), farthest)


def _read_row(row: dict[str, Any], source: Source, spec: DatasetSpec, split: str, index: int) -> Row:
    name = sample_id(split, index)
    try:
        asked_row = sample_row(to_sample(row, spec, name), source.base_dir)
    except ValueError as error:
        asked_row = {**sample_row(_without_image(row, spec, name)), "error": str(error)}
    return {"row_index": index, **asked_row}


def _without_image(row: dict[str, Any], spec: DatasetSpec, name: str) -> Sample:
    """Read what can be read of a row that is no sample; at least its question, as far as it can be shown."""
    try:
        return to_sample(row, replace(spec, image_column=None), name)
    except ValueError:
        answers: tuple[str, ...] = ()
        with contextlib.suppress(ValueError):
            answers = read_texts(row[spec.answer_column]) if spec.answer_column else ()
        return Sample(sample_id=name, question=printable(row[spec.question_column]), answers=answers)


def sample_row(sample: Sample, base_dir: str | None = None) -> Row:
    """Turn a sample into a row, with its image as encoded bytes or still as a URL in `image_url`.

    A path is read here, on the machine that holds the dataset; a URL is fetched by `prepare_row`.
    """
    row: Row = {
        "sample_id": sample.sample_id,
        "question": sample.question,
        "choices": list(sample.choices),
        "answers": list(sample.answers),
        "family": sample.family,
        "error": None,
    }
    if isinstance(sample.image, str) and sample.image.startswith(("http://", "https://")):
        row["image_url"] = sample.image
    elif sample.image is not None:
        _fetch(row, sample.image, base_dir)
    return row


def _fetch(row: Row, image: bytes | str, base_dir: str | None = None) -> None:
    try:
        row["image"] = read_image_bytes(image, base_dir=base_dir)
    except ImageError as error:
        row["error"] = str(error)


def fetch_images(rows: Sequence[Row]) -> None:
    """Fetch the images that are still URLs; one that cannot be had becomes the row's `error`."""
    remote = [row for row in rows if row.get("image_url")]
    with ThreadPoolExecutor(_NUM_FETCHES) as pool:
        list(pool.map(lambda row: _fetch(row, row["image_url"]), remote))
