"""Rows of a source as the values that travel: asked, with their images as encoded bytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from typing import Any, cast

import numpy as np

from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.samples import read_texts, to_sample
from vlmray.dataset.slices import pack_rows, sample_id, unpack_rows
from vlmray.dataset.sources import Source
from vlmray.dataset.text.values import printable
from vlmray.images.decoding import ImageError
from vlmray.images.reading import read_image_bytes
from vlmray.schema import Row, Sample

_NUM_FETCHES = 16
_ROWS_PER_READ = 256
MOST_ROWS_GROUPED = 50_000


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


def read_images(source: Source, spec: DatasetSpec, split: str, index: int) -> list[bytes]:
    """Read the images of a row, still encoded; without those that are URLs."""
    (row,) = read_rows(source, spec, split, [index])
    return [image for image in row["images"] if image is not None]


def _run_end(source: Source, spec: DatasetSpec, selected: Sequence[int], border: int, reach: int) -> int:
    columns = image_columns(source, spec)
    if not columns or not 0 < border < len(selected):
        return min(border, len(selected))

    def images(position: int) -> list[Any]:
        return list(source.read([selected[position]], columns)[0].values())

    last = images(border - 1)
    if last == [None] * len(columns):
        return border  # rows without an image have none in common
    farthest = min(border + reach, len(selected))
    return next((at for at in range(border, farthest) if images(at) != last), farthest)


def image_columns(source: Source, spec: DatasetSpec) -> list[str]:
    """Return the columns that tell which rows have their images in common."""
    return [source.same_image_column] if source.same_image_column else spec.image_columns


def group_by_image(source: Source, spec: DatasetSpec, selected: Sequence[int]) -> Sequence[int]:
    """Bring rows with the same images together, in the place of the first; elsewhere the order stays.

    Their images have to be read for it: where they are at hand, and no more of them than takes seconds.
    """
    is_at_hand = source.on_driver or source.same_image_column is not None
    if not (image_columns(source, spec) and is_at_hand and len(selected) <= MOST_ROWS_GROUPED):
        return selected
    firsts: dict[Any, int] = {}
    groups = np.empty(len(selected), np.int64)
    for place, key in enumerate(image_keys(source, spec, selected)):
        groups[place] = firsts.setdefault(key or place, place)
    order = np.argsort(groups, kind="stable")
    is_grouped = bool((np.diff(order) == 1).all())
    return selected if is_grouped else pack_rows(unpack_rows(selected)[order])


def image_keys(source: Source, spec: DatasetSpec, indices: Sequence[int]) -> Iterator[bytes | None]:
    """Yield for each row what those with the same images have in common; None where it has none."""
    columns = image_columns(source, spec)
    for start in range(0, len(indices), _ROWS_PER_READ):
        some = indices[start : start + _ROWS_PER_READ]
        rows = source.read(some, columns) if columns else [{}] * len(some)
        yield from (_image_key(list(row.values())) for row in rows)


def _image_key(value: Any) -> bytes | None:
    """Return what images that are the same have in common; None where there is none."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, list):
        keys = [*map(_image_key, value)]
        return b"".join(key or b"-" for key in keys) if any(keys) else None
    if value is None:
        return None
    data = value if isinstance(value, bytes) else str(value).encode(errors="surrogatepass")
    return blake2b(data, digest_size=16).digest()


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
        # A conversation or request that is not understood may hold images, megabytes of text.
        question = "" if spec.form else printable(row[spec.question_column])
        return Sample(sample_id=name, question=question, answers=answers)


def sample_row(sample: Sample, base_dir: str | None = None) -> Row:
    """Turn a sample into a row, with its images as encoded bytes or still as URLs in `image_urls`.

    A path is read here, on the machine that holds the dataset; a URL is fetched by `prepare_rows`.
    """
    urls = [_url(image) for image in sample.images]
    row: Row = {
        "sample_id": sample.sample_id,
        "question": sample.question,
        "choices": list(sample.choices),
        "answers": list(sample.answers),
        "family": sample.family,
        "conversation": json.dumps(sample.messages, ensure_ascii=False) if sample.messages else None,
        "own_metric": sample.metric,
        "settings": json.dumps(sample.settings) if sample.settings else None,
        "images": [None] * len(urls),
        "image_urls": urls,
        "error": None,
    }
    for place, image in enumerate(sample.images):
        if urls[place] is None and row["error"] is None:
            _fetch(row, place, image, base_dir)
    return row


def _url(image: bytes | str) -> str | None:
    return image if isinstance(image, str) and image.startswith(("http://", "https://")) else None


def _fetch(row: Row, place: int, image: bytes | str, base_dir: str | None = None) -> None:
    try:
        row["images"][place] = read_image_bytes(image, base_dir=base_dir)
    except ImageError as error:
        row["error"] = str(error)


def fetch_images(rows: Sequence[Row]) -> None:
    """Fetch the images that are still URLs; one that cannot be had becomes the row's `error`."""
    remote = [(row, place, url) for row in rows for place, url in enumerate(row["image_urls"]) if url]
    with ThreadPoolExecutor(_NUM_FETCHES) as pool:
        list(pool.map(lambda each: _fetch(*each), remote))


def images_of(row: Row) -> list[bytes | str | None]:
    """Return the images of a row, those as URLs that were not fetched."""
    pairs = zip(row["images"], row["image_urls"], strict=True)
    return [url if image is None else image for image, url in pairs]


def to_question(row: Row) -> Sample:
    """Return what is asked by a row."""
    return Sample(
        sample_id=row["sample_id"],
        question=row["question"],
        choices=tuple(row["choices"]),
        answers=tuple(row["answers"]),
        images=cast(tuple[bytes | str, ...], tuple(images_of(row))),
        messages=tuple(json.loads(row.get("conversation") or "[]")),
    )
