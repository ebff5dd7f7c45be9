"""Requests for engines, and what transformers itself answers to them."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlmray.engines.base import Engine
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.engines.transformers.in_flight import Prepared
from vlmray.schema import Completion, Form, GenerationRequest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(56, 84), (120, 200), (200, 96), (300, 180), (90, 90)]
QUESTIONS = [
    "What is the value of Germany?",
    "How many people in 2008?",
    "Which color is highest?",
    "Yes or no?",
]

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "values": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 2},
        "kind": {"enum": ["ä \"bar\"", "pie"]},
    },
    "required": ["name", "values", "kind"],
    "additionalProperties": False,
}  # fmt: skip
JSON = Form(schema=json.dumps(_SCHEMA))
CHOICES = Form(choices=("yes", "no", "Straße, 5"))
REGEX = Form(regex="-?[0-9]{1,3}(%|€)")


def make_image(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth random picture: flat patches, so that the vision tower sees more than noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def make_request(number: int, num_images: int = 1, **options: Any) -> GenerationRequest:
    images = [make_image(10 * number + k, SIZES[(number + k) % len(SIZES)]) for k in range(num_images)]
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
    return GenerationRequest(
        request_id=f"test-{number:06d}",
        messages=[{"role": "user", "content": parts}],
        images=images,
        **{"max_new_tokens": 12, **options},
    )


def make_mixed_requests(count: int = 18, **options: Any) -> list[GenerationRequest]:
    """Text-only, one-image and two-image rows of several sizes, in turn."""
    return [make_request(number, number % 3, **options) for number in range(count)]


def make_formed_requests(**options: Any) -> list[GenerationRequest]:
    """Mixed rows of every form, and of none, in turn."""
    forms = [JSON, None, CHOICES, REGEX, None]
    requests = make_mixed_requests(20, **options)
    return [dataclasses.replace(each, form=forms[place % 5]) for place, each in enumerate(requests)]


def generate_alone(model: Any, processor: Any, request: GenerationRequest) -> str:
    """What transformers itself writes for one row without any batching: the reference."""
    prompt = processor.apply_chat_template(request.messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=request.images or None, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=request.max_new_tokens)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load(folder: Path) -> Any:
    """Load a model onto the device that the engine would use."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval().to(DEVICE)


def texts(completions: list[Completion]) -> list[str]:
    assert [c.error for c in completions] == [None] * len(completions)
    return [c.text for c in completions]


def make_shared_requests(num_images: int = 4, **options: Any) -> list[GenerationRequest]:
    """Every question about every image, as bytes of their own, in an order that mixes the images."""
    requests = [
        dataclasses.replace(
            make_request(number % len(QUESTIONS), **options),
            request_id=f"shared-{number:06d}",
            messages=make_request(number % len(QUESTIONS), 1).messages,
            images=[encode_png(make_image(50 + number // len(QUESTIONS), SIZES[number // len(QUESTIONS)]))],
        )
        for number in range(num_images * len(QUESTIONS))
    ]
    random.Random(1).shuffle(requests)
    return requests


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode(request: GenerationRequest) -> GenerationRequest:
    images = [Image.open(io.BytesIO(cast(bytes, data))).convert("RGB") for data in request.images]
    return dataclasses.replace(request, images=images)


def copy_no_rows(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an engine run every row whole, as it does where nothing is known of a model."""
    monkeypatch.setattr(engine.forward, "copies_rows", False)  # fails where there is no such attribute
    assert cast(Prepared, engine.prepare([make_request(1)])).rows[0].head is None


def text_request(text: str, **options: Any) -> GenerationRequest:
    return dataclasses.replace(make_request(0, 0, **options), messages=[{"role": "user", "content": text}])


class Readers:
    """Those who read answers: some leave after so many pieces, each with a place and a number."""

    def __init__(self, leave_after: dict[int, int]) -> None:
        self.pieces: dict[int, list[str]] = defaultdict(list)
        self.ends: list[int] = []
        self._leave_after = leave_after

    def read(self, index: int, text: str) -> None:
        assert not self.has_left(index), "told after it had left"
        self.pieces[index].append(text)

    def has_left(self, index: int) -> bool:
        return len(self.pieces[index]) >= self._leave_after.get(index, 10**6)

    def answer(self, engine: Engine, requests: list[GenerationRequest]) -> list[Completion]:
        return engine.generate(
            requests,
            on_text=self.read,
            on_end=lambda index, completion: self.ends.append(index),
            cancelled=self.has_left,
        )


def check_that_leavers_leave(engine: Engine) -> None:
    """See that a row which nobody wants ends, and that no other row notices."""
    requests = make_mixed_requests(9, max_new_tokens=24)
    undisturbed = Readers({})
    whole = undisturbed.answer(engine, requests)
    leavers = {1: 1, 2: 2, 5: 0, 7: 3}  # place and pieces; the batch of some goes on without them
    assert min(len(undisturbed.pieces[place]) for place in leavers) > 4  # else nothing is cut off
    readers = Readers(leavers)
    found = readers.answer(engine, requests)
    assert sorted(readers.ends) == list(range(9))
    for place, (before, after) in enumerate(zip(whole, found, strict=True)):
        assert after.text == "".join(readers.pieces[place])
        if place not in leavers:
            assert after == before
            continue
        assert (after.finish_reason, after.error) == ("cancelled", None)
        assert before.text.startswith(after.text)
        assert len(readers.pieces[place]) == leavers[place]
        assert leavers[place] <= after.num_completion_tokens < before.num_completion_tokens
    assert found[5].num_completion_tokens == 0
