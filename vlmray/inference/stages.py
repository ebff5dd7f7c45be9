"""What happens to a row between a dataset and a result; the same with Ray and without.

    read_chunk -> prepare_rows -> generate_rows -> score_row -> save_rows
    question,     messages,       prediction,      score         files, Parquet
    image bytes   checked image   token counts

Rows are plain values under the names of `Row`; images travel encoded (about 40 KB) and are decoded beside the
model. A row whose image is
broken or whose question is empty gets an `error` here, and later stages pass it on untouched.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

from vlmray import metrics
from vlmray.config import shared_options
from vlmray.dataset.prompts import format_data
from vlmray.dataset.rows import fetch_images, sample_row
from vlmray.engines.base import Engine
from vlmray.images.decoding import decode_image, encode_jpeg, is_plain_jpeg
from vlmray.inference.result_folder import RESULT_SCHEMA, ResultFolder, pick
from vlmray.schema import Completion, GenerationRequest, Row, Sample, Sampling

ASKED_COLUMNS = ("sample_id", "row_index", "question", "choices", "answers", "family")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Sampling):
    """How questions are asked and scored: everything about a run but its model and its rows."""

    prompt_template: str
    system_prompt: str | None = None
    metric: str


def prepare_rows(
    rows: Sequence[Row], task: Task, *, keep_images: bool = True, fetches_images: bool = True
) -> list[Row]:
    """Fetch images that are URLs, see that all images decode, and build the messages.

    Args:
        rows: Rows as `read_chunk` gives them.
        task: How questions are asked.
        keep_images: Encode what `_img.jpg` will hold, here where the image is decoded anyway.
        fetches_images: Fetch images that are URLs; else whoever answers does.
    """
    if fetches_images:
        fetch_images(rows)
    check = functools.lru_cache(maxsize=2)(functools.partial(_check_image, keep=keep_images))
    for row in rows:
        if row["error"] is None:
            _prepare_row(row, task, check)
    return list(rows)


def _prepare_row(row: Row, task: Task, check_image: Callable[[bytes], bytes | None]) -> None:
    image = row.get("image")
    sample = Sample(
        sample_id=row["sample_id"],
        question=row["question"],
        choices=tuple(row["choices"]),
        image=row.get("image_url") if image is None else image,
    )
    try:
        messages = format_data(sample, system_prompt=task.system_prompt, prompt_template=task.prompt_template)
        row["jpeg"] = None if image is None else check_image(image)
    except ValueError as error:
        row["error"] = str(error)
    else:
        row["messages"] = json.dumps(messages, ensure_ascii=False)


def _check_image(data: bytes, *, keep: bool) -> bytes | None:
    """Decode an image; return it as a JPEG to keep, if one is wanted and can hold it."""
    image = decode_image(data)
    if not keep:
        return None
    try:
        return data if is_plain_jpeg(data) else encode_jpeg(image)
    except OSError:  # more pixels to a side than a JPEG can have
        return None


def generate_rows(
    rows: Sequence[Row], engine: Engine, task: Task, turn: AbstractContextManager[None] | None = None
) -> list[Row]:
    """Answer the rows that have neither an error nor an answer with one call of the engine.

    Args:
        rows: Rows as `prepare_rows` gives them.
        engine: Answers them.
        task: How questions are asked.
        turn: Entered while the model works, for threads that share an engine.
    """
    pending = [row for row in rows if is_pending(row)]
    completions: list[Completion] = []
    if pending:
        requests = engine.prepare(make_requests(pending, task))
        with turn or nullcontext():
            completions = engine.generate(requests)
    for row, completion in zip(pending, completions, strict=True):
        row |= answered(completion)
    return list(rows)


def is_pending(row: Row) -> bool:
    """Tell whether a prepared row is still to be asked."""
    return row["error"] is None and "finish_reason" not in row


def make_requests(rows: Sequence[Row], task: Task) -> list[GenerationRequest]:
    """Turn prepared rows into requests; the engine decodes their images while it generates."""
    return [_make_request(row, task) for row in rows]


def _make_request(row: Row, task: Task) -> GenerationRequest:
    messages, image = row["messages"], row.get("image") or row.get("image_url")
    assert messages is not None
    return GenerationRequest(
        request_id=row["sample_id"],
        messages=json.loads(messages),
        images=[] if image is None else [cast(bytes, image)],  # or a URL, where one is passed on
        **shared_options(task, Sampling),
    )


def answered(completion: Completion) -> Row:
    """Return what a completion adds to a row."""
    return {
        "prompt": completion.prompt,
        "prediction": None if completion.error else completion.text,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_completion_tokens": completion.num_completion_tokens,
        "finish_reason": completion.finish_reason,
        "num_cached_tokens": completion.num_cached_tokens,
        "error": completion.error,
    }


def score_row(row: Row, task: Task) -> Row:
    """Score an answered row that has answers to compare with; mark a failed one. It has all columns then."""
    row = cast(Row, {**dict.fromkeys(RESULT_SCHEMA.names), **row})
    if row["error"] is not None:
        row["finish_reason"] = "error"
    elif row["answers"] and (prediction := row["prediction"]) is not None:
        row["metric"] = task.metric
        row["score"] = metrics.score(task.metric, prediction, row["answers"]).value
    return row


def asked(row: Row) -> dict[str, Any]:
    """Return what `_in.json` records of a row: the question as it was put to the model."""
    messages = row.get("messages")
    return {
        **pick(row, ASKED_COLUMNS),
        "messages": json.loads(messages) if messages else None,
        "image": f"{row['sample_id']}_img.jpg" if row.get("jpeg") else None,
    }


def save_rows(rows: Sequence[Row], folder: ResultFolder) -> None:
    """Write finished rows to the output folder; a row that was not asked leaves no `_img.jpg`."""
    folder.save(rows, map(asked, rows), (row.get("jpeg") for row in rows))


def process_single_sample(
    sample: Sample, engine: Engine, task: Task, folder: ResultFolder | None = None
) -> Row:
    """Answer one sample without Ray: prepare, generate, score, and write it if a folder is given.

    Returns:
        The result row (`RESULT_SCHEMA` and what the stages carry); `error` says why there is no answer.
    """
    row = score_row(generate_rows(prepare_rows([sample_row(sample)], task), engine, task)[0], task)
    if folder is not None:
        save_rows([row], folder)
    return row
