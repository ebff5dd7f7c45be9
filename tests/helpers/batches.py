"""A file of OpenAI batch requests, some broken, and what has to come out of it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from openai.types import BatchError
from openai.types.chat import ChatCompletion

from helpers.rows import make_image

NUM_REQUESTS = 200


def _uri(number: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(make_image(number)).decode()}"


def body_of(number: int, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": _uri(number)}}] * (number % 3)
    content = [*parts, {"type": "text", "text": f"Question {number}?"}]
    return {"model": "fake", "messages": [{"role": "user", "content": content}], **fields}


def line_of(number: int, **fields: Any) -> dict[str, Any]:
    line = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/chat/completions"}
    return {**line, "body": body_of(number), **fields}


BROKEN: dict[int, tuple[dict[str, Any], str]] = {
    3: ({"body": None}, "body is NoneType; expected a request of /v1/chat/completions"),
    20: ({"body": "Why?"}, "body is a text; expected a request"),
    33: ({"custom_id": 33}, "custom_id is missing; every request of a batch has one, a text"),
    41: ({"method": "GET"}, "method is 'GET'; expected POST"),
    60: ({"url": "/v1/embeddings"}, "url is '/v1/embeddings'; expected /v1/chat/completions"),
    77: ({"body": {"model": "fake"}}, "messages is missing"),
    90: ({"body": body_of(1, model="gpt-9")}, "the model 'gpt-9' does not exist; known: "),
    130: ({"body": body_of(1, stream=True)}, "stream is for a client that waits"),
    150: ({"body": {**body_of(1), "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]}}, "cannot identify"),
    199: ({"body": {**body_of(1), "messages": [{"role": "user", "content": [
        {"type": "video_url", "video_url": {"url": "a.mp4"}}]}]}}, "it is a video"),
}  # fmt: skip


def write_batch(path: Path, model: str = "fake") -> Path:
    """Write the file, whose requests ask for this model."""
    lines = (line_of(number, **BROKEN.get(number, ({}, ""))[0]) for number in range(NUM_REQUESTS))
    text = "\n".join(map(json.dumps, lines))
    path.write_text(text.replace('"model": "fake"', f'"model": "{model}"'), encoding="utf-8")
    return path


def check_output(path: Path) -> list[str]:
    """See that each request has its line, in order, as the official client reads it; return the answers."""
    lines = [json.loads(line) for line in path.open(encoding="utf-8")]
    ids = [33 if number == 33 else f"id-{number}" for number in range(NUM_REQUESTS)]
    assert [line["custom_id"] for line in lines] == ids
    assert len({line["id"] for line in lines}) == NUM_REQUESTS
    assert [number for number, line in enumerate(lines) if line["error"]] == sorted(BROKEN)
    answers = []
    for number, line in enumerate(lines):
        if number in BROKEN:
            error = BatchError.model_validate(line["error"])
            assert line["response"] is None
            assert error.code == "invalid_request"
            assert BROKEN[number][1] in str(error.message)
        else:
            answer = ChatCompletion.model_validate(line["response"]["body"])
            assert line["response"]["status_code"] == 200
            assert answer.usage is not None
            assert answer.usage.completion_tokens > 0
            answers.append(answer.choices[0].message.content or "")
    return answers
