"""What happens to a row between a dataset and a result; the same with Ray and without.

    read_chunk -> prepare_rows -> generate_rows -> score_row -> save_rows
    question,     messages,       prediction,      score         files, Parquet
    image bytes   checked image   token counts

Rows are plain values under the names of `Row`; images travel encoded (about 40 KB) and are decoded beside the
model. A row with a broken image or an empty question gets an `error` here, and later stages pass it on
untouched.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

from vlmray import metrics
from vlmray.config import shared_options
from vlmray.dataset.prompts import format_data
from vlmray.dataset.rows import fetch_images, images_of, sample_row, to_question
from vlmray.engines.base import Engine
from vlmray.engines.forms import keeps, parses
from vlmray.engines.logprobs import to_json
from vlmray.images.decoding import decode_image, encode_jpeg, is_plain_jpeg
from vlmray.inference.drawing.voting import by_row, draws_of, settle
from vlmray.inference.result_folder import RESULT_SCHEMA, ResultFolder, image_names, pick
from vlmray.inference.reuse.answers import Known
from vlmray.inference.reuse.keys import request_key
from vlmray.inference.reuse.taking import taking_over
from vlmray.schema import Completion, Form, GenerationRequest, Row, Sample, Sampling

ADAPTER = "adapter"
"""What a run's adapter is called where requests ask for it or for its base."""

ASKED_COLUMNS = ("sample_id", "row_index", "question", "choices", "answers", "family")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(Sampling):
    """How questions are asked and scored: everything about a run but its model and its rows."""

    prompt_template: str
    open_prompt_template: str | None = None
    """That of questions without choices, where it is another."""

    system_prompt: str | None = None
    metric: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    num_samples: int = 1
    """Answers that are drawn to each row."""

    models: Mapping[str, str | None] = field(default_factory=dict)
    """Names that rows which are requests may ask for, and the adapter that each stands for."""


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
    check = functools.lru_cache(maxsize=8)(functools.partial(_check_image, keep=keep_images))
    for row in rows:
        if row["error"] is None:
            _prepare_row(row, task, check)
    return list(rows)


def _prepare_row(row: Row, task: Task, check_image: Callable[[bytes], bytes | None]) -> None:
    sample = to_question(row)
    try:
        _check_model(row, task)
        template = task.prompt_template if sample.choices else task.open_prompt_template
        messages = format_data(
            sample, system_prompt=task.system_prompt, prompt_template=template or task.prompt_template
        )
        row["jpegs"] = [None if image is None else check_image(image) for image in row["images"]]
    except ValueError as error:
        row["error"] = str(error)
    else:
        row["messages"] = json.dumps(messages, ensure_ascii=False)


def _check_model(row: Row, task: Task) -> None:
    model = _own_settings(row).get("model")
    if model is not None and model not in task.models:
        raise ValueError(f"the model {model[:80]!r} does not exist; known: {', '.join(task.models)}")


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
    rows: Sequence[Row], engine: Engine, task: Task, turn: AbstractContextManager[None] | None = None,
    known: Known | None = None,
) -> list[Row]:  # fmt: skip
    """Answer the rows that have neither an error nor an answer with one call of the engine.

    Args:
        rows: Rows as `prepare_rows` gives them.
        engine: Answers them.
        task: How questions are asked.
        turn: Entered while the model works, for threads that share an engine.
        known: Knows answers that are taken over; without, every row is asked.
    """
    pending = [row for row in rows if is_pending(row)]
    completions: list[Completion] = []
    with taking_over(pending, functools.partial(row_key, task=task), known) as asked:
        if pending:
            requests = engine.prepare(make_requests(asked, task))
            with turn or nullcontext():
                completions = engine.generate(requests)
        for row, drawn in zip(asked, by_row(completions, task.num_samples), strict=True):
            row |= answered(*drawn)
            if (logprobs := drawn[0].logprobs) is not None and "num_logprobs" in _own_settings(row):
                row["logprobs"] = to_json(logprobs)
    return list(rows)


def row_key(row: Row, task: Task) -> bytes | None:
    """Return what rows have in common that have one answer; None where it is the row's alone."""
    return request_key(_make_request(row, task), row.get("settings"))


def is_pending(row: Row) -> bool:
    """Tell whether a prepared row is still to be asked."""
    return row["error"] is None and "finish_reason" not in row


def make_requests(rows: Sequence[Row], task: Task) -> list[GenerationRequest]:
    """Turn prepared rows into requests; the engine decodes their images while it generates.

    Where several answers are drawn to a row, the requests for them stand together.
    """
    return [draw for row in rows for draw in draws_of(_make_request(row, task), task.num_samples)]


def _make_request(row: Row, task: Task) -> GenerationRequest:
    messages = row["messages"]
    assert messages is not None
    own = _own_settings(row)
    own["form"] = _form_of(own, task)
    template = {**task.chat_template_kwargs, **own.pop("chat_template_kwargs", {})}
    return GenerationRequest(
        request_id=row["sample_id"],
        messages=json.loads(messages),
        images=cast(list[Any], images_of(row)),  # among them URLs, where those are passed on
        chat_template_kwargs=template,
        adapter=task.models.get(own.pop("model", "")),
        **shared_options(task, Sampling) | own,
    )


def _own_settings(row: Row) -> dict[str, Any]:
    """Return what a row, which is a request, says itself of how it is answered."""
    return {name: _unlisted(value) for name, value in json.loads(row.get("settings") or "{}").items()}


def _form_of(own: Mapping[str, Any], task: Task) -> Form | None:
    """Return what the answer has to be to a row with settings of its own."""
    form = own.get("form")
    return Form(**{name: _unlisted(value) for name, value in form.items()}) if form else task.form


def _unlisted(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def answered(*drawn: Completion) -> Row:
    """Return what a completion adds to a row, or what all draws of its answer do."""
    completion, columns = settle(drawn)
    return {
        "prompt": completion.prompt,
        "prediction": None if completion.error else completion.text,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_completion_tokens": completion.num_completion_tokens,
        **_certainty(completion),
        "finish_reason": completion.finish_reason,
        "num_cached_tokens": completion.num_cached_tokens,
        "error": completion.error,
        **columns,
    }


def _certainty(completion: Completion) -> Row:
    """Return how likely the model held an answer; the probabilities of tokens multiply."""
    logprobs = [token.logprob for token in completion.logprobs or ()]
    if not logprobs or completion.error is not None:
        return {"confidence": None, "min_token_probability": None}
    return {
        "confidence": min(1.0, math.exp(math.fsum(logprobs))),
        "min_token_probability": min(1.0, math.exp(min(logprobs))),
    }


def score_row(row: Row, task: Task) -> Row:
    """Score an answered row that has answers to compare with; mark a failed one. It has all columns then."""
    row = cast(Row, {**dict.fromkeys(RESULT_SCHEMA.names), **row})
    if row["error"] is not None:
        row["finish_reason"] = "error"
        return row
    form = _form_of(_own_settings(row), task)
    if form is not None:
        text = row["prediction"] or ""
        row["keeps_form"] = keeps(form, text)
        row["parsed"] = text if form.schema is not None and parses(text) else None
    if row["answers"] and (prediction := row["prediction"]) is not None:
        metric, drawn = row.get("own_metric") or task.metric, row["samples"] or []
        try:
            scores = {
                text: metrics.score(metric, text, row["answers"], row["choices"]).value
                for text in {prediction, *drawn}
            }
        except (ValueError, RecursionError) as error:  # what a dataset has for an answer may be no such thing
            problem = f"the row's answers cannot be scored: {error}"
            row |= {"prediction": None, "samples": None, "agreement": None}
            return row | {"error": problem, "finish_reason": "error"}
        row["metric"], row["score"] = metric, scores[prediction]
        row["sample_scores"] = [scores[text] for text in drawn] or None
    return row


def asked(row: Row) -> dict[str, Any]:
    """Return what `_in.json` records of a row: the question as it was put to the model."""
    messages, jpegs = row.get("messages"), row.get("jpegs") or []
    names = [name for name, jpeg in zip(image_names(row["sample_id"]), jpegs, strict=False) if jpeg]
    return {
        **pick(row, ASKED_COLUMNS),
        "messages": json.loads(messages) if messages else None,
        "image": names[0] if names else None,
        **({"images": names} if len(jpegs) > 1 else {}),
    }


def save_rows(rows: Sequence[Row], folder: ResultFolder) -> None:
    """Write finished rows to the output folder; a row that was not asked leaves no `_img.jpg`."""
    folder.save(rows, map(asked, rows), (row.get("jpegs") or [] for row in rows))


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
