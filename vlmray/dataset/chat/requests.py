"""Rows of OpenAI's batch files: each a request as a client would send it to a server.

{"custom_id", "method", "url", "body"} -> read_request_row -> Sample with messages, images and settings
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmray.dataset.text.values import Written, name_kind, with_numbers
from vlmray.schema import Sample, text_of

if TYPE_CHECKING:
    from vlmray.protocol.request import ChatRequest

REQUEST_COLUMNS = frozenset({"custom_id", "body"})
"""Columns that tell a batch file."""

_URL = "/v1/chat/completions"


def read_request_row(row: Mapping[str, Any], sample_id: str) -> Sample:
    """Read a row as what it asks.

    Raises:
        ValueError: It is no request that can be answered.
    """
    # The parser takes memory and time to load, which tasks that read other rows shall not pay for.
    from vlmray.protocol.errors import ApiError
    from vlmray.protocol.request import image_sources, read_request, to_messages

    _check_line(row)
    body = with_numbers(row["body"])
    if not isinstance(body, dict):
        raise ValueError(f"body is {name_kind(body)}; expected a request of {_URL}")
    try:
        request = read_request(body)
    except ApiError as error:
        raise ValueError(str(error)) from error
    if request.stream:
        raise ValueError("stream is for a client that waits; leave it out of a batch")
    sources = image_sources(request)
    for place, url in sources.items():
        if not url.lower().startswith(("data:", "http://", "https://")):
            raise ValueError(f"{place}.url is neither a data URI nor an http(s) URL")
    messages = to_messages(request)
    asked = [message for message in messages if message["role"] == "user"]
    return Sample(
        sample_id=sample_id,
        question=text_of(asked[-1]) if asked else "",
        images=tuple(sources.values()),
        messages=tuple(messages),
        settings=_settings(request),
    )


def _check_line(row: Mapping[str, Any]) -> None:
    custom_id = row["custom_id"]
    if not isinstance(custom_id, str) or isinstance(custom_id, Written) or not custom_id:
        raise ValueError("custom_id is missing; every request of a batch has one, a text")
    for name, expected in (("method", "POST"), ("url", _URL)):
        if row.get(name) != expected:
            raise ValueError(f"{name} is {row.get(name)!r}; expected {expected}")


def _settings(request: ChatRequest) -> dict[str, Any]:
    """Return how an answer is drawn, as far as the request says."""
    from vlmray.protocol.request import sampling

    said = {
        "max_new_tokens": request.limit, "seed": request.seed, "stop": list(request.stop_texts) or None,
        "stop_token_ids": request.stop_token_ids, "chat_template_kwargs": request.template_kwargs or None,
    }  # fmt: skip
    given = {name: value for name, value in said.items() if value is not None} | sampling(request)
    form = {"form": dataclasses.asdict(given["form"])} if "form" in given else {}
    return {"model": request.model, **given, **form}
