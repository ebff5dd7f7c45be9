"""Rows with two images are answered as the plain way answers them, by whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.rows import SPEC, TASK, ListSource, make_image
from vlmray.dataset.rows import read_rows
from vlmray.engines.openai.images import PixelBounds
from vlmray.engines.openai.wire import to_body
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.images.decoding import decode_image
from vlmray.images.reading import read_image_bytes
from vlmray.inference.stages import generate_rows, make_requests, prepare_rows
from vlmray.models.loading import generate_text_from_sample, load_qwen_vl_model_and_processor
from vlmray.protocol.request import image_sources, read_request, to_messages

A, B, C = (make_image(number, size=(56, 84)) for number in (40, 120, 240))
QUESTIONS = [
    ([A, B], "Which is darker?"),
    ([A, B], "<image><image>How many?"),
    ([B, A], "Which is darker?"),
    ([A], "What is it?"),
    ([A, C], "Is <image> as <image>?"),
    ([C, A, B], "<image 2> or <image 3>?"),
]


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    source = ListSource([{"image": images, "question": text, "answer": "x"} for images, text in QUESTIONS])
    return prepare_rows(read_rows(source, SPEC, "test", range(len(QUESTIONS))), TASK)


def _reference(model: Any, processor: Any, messages: list[dict[str, Any]], images: list[Any]) -> str:
    """Answer as model cards say: messages that hold their images, the template, `generate`."""
    pictures = iter(images)
    asked = [
        {**message, "content": [
            {"type": "image", "image": decode_image(next(pictures))} if part["type"] == "image" else part
            for part in message["content"]
        ]}
        for message in messages
    ]  # fmt: skip
    inputs = processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True))


def test_texts_are_those_of_the_reference_and_beginnings_are_shared(
    rows: list[Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_qwen_vl_model_and_processor(str(tiny_model), dtype="float32")
    requests = make_requests(rows, TASK)
    expected = [_reference(model, processor, each.messages, each.images) for each in requests]
    for request, text in zip(requests, expected, strict=True):
        assert generate_text_from_sample(
            model, processor, _decoded(request), max_new_tokens=12
        )[0] == text  # fmt: skip
    engine = TransformersEngine(model, processor)
    task = TASK.__class__(prompt_template="{question}", metric="exact_match", max_new_tokens=12)
    opened = engine.prepare(make_requests(rows, task)).rows  # type: ignore[attr-defined]
    heads = [row.head for row in sorted(opened, key=lambda row: row.index)]
    assert heads[0] == heads[1]
    assert len(set(heads)) == len(heads) - 1
    answered = generate_rows([dict(row) for row in rows], engine, task)  # type: ignore[misc]
    engine.close()
    assert [row["prediction"] for row in answered] == expected


def _decoded(request: Any) -> Any:
    import dataclasses

    return dataclasses.replace(request, images=[decode_image(image) for image in request.images])


def test_a_server_is_asked_the_same(rows: list[Any]) -> None:
    """What `openai` engines and benchmarks send is what the server's protocol reads back."""
    for request in make_requests(rows, TASK):
        body = to_body(request, "m", PixelBounds())
        body |= body.pop("extra_body")
        found = read_request(body)
        assert to_messages(found) == request.messages
        assert [read_image_bytes(url) for url in image_sources(found).values()] == request.images
