"""What people do with a model by its card, for what the package does to be compared with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from helpers.engines import make_image
from vlmray.models.families.base import Family
from vlmray.schema import GenerationRequest

QUESTIONS = ("What is it?", "How many people are in the year?", "Which color?")
SIZES = ((70, 40), (40, 64), (90, 50))
WITHOUT_TEXT_ONLY = ("paligemma",)  # its processor wants an image
WITHOUT_MERGER = ("gemma3", "glm4v_moe")  # a bare parameter; names that PEFT takes for experts
PADS_INEXACTLY = ("mllama",)  # what is padded changes the losses of others, as with its own processor


@dataclass(frozen=True)
class Checkpoint:
    """A tiny model of a family, loaded."""

    name: str
    folder: Path
    model: Any
    processor: Any
    family: Family


def ask(number: int, *images: int, text: str | None = None, **options: Any) -> GenerationRequest:
    """Ask a question about images, which are told by their numbers."""
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text or QUESTIONS[number % 3]}]
    return GenerationRequest(
        request_id=f"{number}",
        messages=[{"role": "user", "content": parts}],
        images=[_image(image) for image in images],
        **{"max_new_tokens": 5, **options},
    )


@functools.cache
def _image(number: int) -> Image.Image:
    return make_image(number, SIZES[number % len(SIZES)])  # the same each time, so that rows share it


def mixed_requests(tiny: Checkpoint) -> list[GenerationRequest]:
    """Ask two questions about each of three images, one about two, and some about none in between."""
    requests = [ask(number, number % 3) for number in range(3)]
    requests += [ask(number + 1, number % 3) for number in range(3)]
    requests[2:2] = [ask(6, 0, 2), ask(7, 0, 2)]
    if tiny.name not in WITHOUT_TEXT_ONLY:
        requests[1:1] = [ask(8)]
        requests += [ask(9)]
    return requests


def inputs_by_the_card(tiny: Checkpoint, request: GenerationRequest) -> dict[str, torch.Tensor]:
    """Make a model's inputs as model cards say."""
    if tiny.family.chat_template is not None:  # PaliGemma's card: placeholders, then the question
        text = "<image>" * len(request.images) + request.messages[0]["content"][-1]["text"]
        inputs = dict(tiny.processor(text=[text], images=[request.images], return_tensors="pt"))
        inputs.pop("labels")
        return inputs
    images = iter(request.images)
    messages = [
        {
            **message,
            "content": [
                {"type": "image", "image": next(images)} if part["type"] == "image" else dict(part)
                for part in message["content"]
            ],
        }
        for message in request.messages
    ]
    return dict(
        tiny.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def text_by_the_card(tiny: Checkpoint, request: GenerationRequest, model: Any = None) -> str:
    """Answer a request as model cards say."""
    inputs = inputs_by_the_card(tiny, request)
    output = (model or tiny.model).generate(**inputs, do_sample=False, max_new_tokens=request.max_new_tokens)
    new = output[0, inputs["input_ids"].shape[1] :]
    text: str = tiny.processor.tokenizer.decode(new, skip_special_tokens=True)
    return text


def sample(number: int, answer: str, *images: int) -> dict[str, Any]:
    """Make a sample of a question and its answer."""
    request = ask(number, *images)
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return {"sample_id": f"{number}", "messages": [*request.messages, turn], "images": request.images}


def special_tokens(processor: Any) -> Sequence[str]:
    """Return every token that no text may forge."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.values()
    return sorted({*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)})
