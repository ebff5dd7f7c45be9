"""Requests on their way to vLLM: their prompts as tokens, their images decoded.

vLLM gets tokens with one placeholder an image, never a text: it would read special tokens in what people
wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from vlmray.engines.base import check_request, limit_answer
from vlmray.engines.rows import Row
from vlmray.engines.transformers.batching import count_visual_tokens
from vlmray.images.decoding import decode_image
from vlmray.models.prompts import ChatPrompts
from vlmray.schema import GenerationRequest

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

Images = list[Image]


@dataclass(slots=True)
class AsyncRow(Row):
    """A request on its way through vLLM."""

    token_ids: Sequence[int] = ()
    """Its prompt, with one placeholder an image."""

    adapter: LoRARequest | None = None
    images: Future[Images] | None = None

    def free(self) -> None:
        """Let go of the images."""
        self.images = None


class Prepared(list[GenerationRequest]):
    """Requests, and how far the engine is with them."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        super().__init__(requests)
        self.rows = [AsyncRow(index, request) for index, request in enumerate(requests)]


class Opener:
    """Words requests, and finds what is wrong with them.

    Args:
        processor: As `vlmray.models.processors.load_processor` gives it.
        templates: Chat templates of adapters that have one of their own.
    """

    def __init__(self, processor: Any, templates: Mapping[str | None, str]) -> None:
        self._processor = processor
        self._templates = templates
        self._prompts = ChatPrompts(processor)

    def open(self, row: AsyncRow, max_model_len: int | None) -> None:
        """Check a request, and make tokens of its prompt; whatever is wrong with it is raised."""
        request = row.request
        check_request(request)
        template = self._templates.get(request.adapter)
        prompt = self._prompts.render_request(request, template)
        row.prompt = self._prompts.readable(prompt)
        row.token_ids = self._prompts.tokenize(prompt)
        limit_answer(request, len(row.token_ids), max_model_len)  # before its images are looked at
        self._check_placeholders(row)
        sizes = [count_visual_tokens(self._processor, image) for image in request.images]
        limit_answer(request, len(row.token_ids) + sum(sizes) - len(sizes), max_model_len)

    def _check_placeholders(self, row: AsyncRow) -> None:
        """Refuse a prompt whose text has placeholders of its own: it would take a neighbour's image."""
        image_id = getattr(self._processor, "image_token_id", None)
        found, expected = row.token_ids.count(image_id), len(row.request.images)
        if image_id is not None and found != expected:
            raise ValueError(f"the prompt has {found} image tokens where its images give {expected}")
        video_id = getattr(self._processor, "video_token_id", None)
        if video_id is not None and video_id in row.token_ids:
            raise ValueError("the prompt holds a video placeholder, and video is not supported")


def decode(images: Sequence[Image | bytes]) -> Images:
    """Decode those that are encoded."""
    return [decode_image(image) if isinstance(image, bytes) else image for image in images]


def image_name(image: Image | bytes) -> str | None:
    """Return what vLLM knows an image by, without a look at its pixels."""
    return hashlib.blake2b(image, digest_size=16).hexdigest() if isinstance(image, bytes) else None
