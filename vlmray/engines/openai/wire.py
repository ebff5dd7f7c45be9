"""Requests and answers as OpenAI's protocol has them.

GenerationRequest -> to_body -> body of POST /v1/chat/completions; its answer -> to_completion -> Completion
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from vlmray.engines.base import failed_completion
from vlmray.engines.openai.images import PixelBounds, to_url
from vlmray.models.templates.tools import word_tools
from vlmray.schema import Completion, Form, GenerationRequest, TokenLogprob

_BESIDE = {
    "top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
    "min_new_tokens": "min_tokens", "ignore_eos": "ignore_eos",
    "continue_final_message": "continue_final_message", "chat_template_kwargs": "chat_template_kwargs",
}  # fmt: skip
"""What is asked for beside the usual, and vLLM's names of it: not every server knows them."""


def to_body(request: GenerationRequest, model: str, bounds: PixelBounds) -> dict[str, Any]:
    """Return what the client of the package `openai` is told.

    Raises:
        ValueError: An image cannot be decoded.
    """
    beside = {theirs: value for ours, theirs in _BESIDE.items() if (value := getattr(request, ours))}
    if request.stop_token_ids:
        beside["stop_token_ids"] = list(request.stop_token_ids)
    if not request.add_generation_prompt:
        beside["add_generation_prompt"] = False
    body: dict[str, Any] = {
        "model": model,
        "messages": _messages(request, bounds),
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "extra_body": beside,
        **_wanted(request.form, beside),
        **_probabilities(request.num_logprobs),
    }
    return {**body, "stop": list(request.stop)} if request.stop else body


def _probabilities(num_likeliest: int | None) -> dict[str, Any]:
    """Ask how likely tokens are; not every server takes to be asked for none beside them."""
    if num_likeliest is None:
        return {}
    return {"logprobs": True, **({"top_logprobs": num_likeliest} if num_likeliest else {})}


def _wanted(form: Form | None, beside: dict[str, Any]) -> dict[str, Any]:
    """Say what the answer has to be: JSON as OpenAI's API has it, the rest as vLLM's servers and ours do."""
    if form is None:
        return {}
    if form.schema is not None:
        schema = {"name": "answer", "schema": json.loads(form.schema), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    beside["structured_outputs"] = {"regex": form.regex} if form.regex else {"choice": list(form.choices)}
    return {}


def _messages(request: GenerationRequest, bounds: PixelBounds) -> list[dict[str, Any]]:
    """Put the images where the messages have places for them."""
    images = iter(request.images)

    def part_of(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] not in ("image", "image_url"):
            return part
        return {"type": "image_url", "image_url": {"url": to_url(next(images), bounds)}}

    def content_of(content: Any) -> Any:
        return content if isinstance(content, str) else list(map(part_of, content))

    # What the server's template knows of functions is not known here.
    messages = word_tools(request.messages, request.tools)
    return [{**message, "content": content_of(message["content"])} for message in messages]


def with_own_seed(request: GenerationRequest) -> GenerationRequest:
    """Return a request that samples with a seed of its own, made of its seed and id: servers do not see ids.

    The requests of a run have one seed in common, and shall not have one fate.
    """
    if request.temperature == 0:
        return request
    digest = hashlib.sha256(f"{request.seed}\0{request.request_id}".encode()).digest()
    return dataclasses.replace(request, seed=int.from_bytes(digest[:4], "big") >> 1)


def to_completion(
    text: str | None, reason: str | None, usage: Any, logprobs: Sequence[Any] | None = None
) -> Completion:
    """Return an answer as engines do; `usage` may be None, and so may how likely its tokens are."""
    if reason == "content_filter":
        return failed_completion(ValueError("the server's content filter ended the answer"))
    return Completion(
        text=text or "",
        prompt="",  # the server's template writes it
        num_prompt_tokens=usage.prompt_tokens if usage else 0,
        num_completion_tokens=usage.completion_tokens if usage else 0,
        finish_reason="length" if reason == "length" else "stop",
        num_cached_tokens=_num_cached(usage),
        logprobs=None if logprobs is None else tuple(map(_to_logprob, logprobs)),
    )


def _to_logprob(found: Any) -> TokenLogprob:
    """Read what a server says of a token, or of another in its place."""
    return TokenLogprob(
        token=found.token,
        data=None if found.bytes is None else bytes(found.bytes),
        logprob=found.logprob,
        top=tuple(map(_to_logprob, getattr(found, "top_logprobs", None) or ())),
    )


def _num_cached(usage: Any) -> int | None:
    """Read what of a prompt was cached, where the server says so."""
    count = getattr(getattr(usage, "prompt_tokens_details", None), "cached_tokens", None)
    return count if isinstance(count, int) else None


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float:
    """Return how long a server wants to be left alone: seconds, or the time until an HTTP date.

    >>> retry_after_s({"retry-after": "1.5"})
    1.5
    >>> noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    >>> retry_after_s({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, noon)
    30.0
    >>> retry_after_s({"retry-after": "soon"}), retry_after_s({})
    (0.0, 0.0)
    """
    text = headers.get("retry-after", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())
