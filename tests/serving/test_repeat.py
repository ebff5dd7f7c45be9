"""Requests whose gateway is lost, as a proxy of Serve sees them: the application returns without a word."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from ray.serve._private.http_util import (
    call_function_from_import_path,
    validate_http_proxy_callback_return,
)

from vlmray.serving.http import repeat
from vlmray.serving.http.middleware import CHAT

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
STREAM = {**START, "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]}
BODY = [
    {"type": "http.request", "body": half, "more_body": more} for half, more in ((b"a", True), (b"b", False))
]
LEFT = {"type": "http.disconnect"}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "_PAUSE_S", 0)


def play(
    gateways: list[list[Any]], reads: int = 2, path: str = CHAT, method: str = "POST", left: bool = False
) -> tuple[list[bytes], list[Any]]:
    """Return what each gateway has read of the body, and what the client got.

    Args:
        gateways: What each sends before it is lost; the last one is asked again and again.
        reads: How much each reads before.
        path: What is asked.
        method: How.
        left: Whether the client leaves behind its body.
    """
    coming = iter([*BODY, *([LEFT] if left else [])])
    bodies: list[bytes] = []
    sent: list[Any] = []

    async def gateway(scope: Any, receive: Any, send: Any) -> None:
        found = [await receive() for _ in range(reads)]
        bodies.append(b"".join(message.get("body", b"") for message in found))
        for message in gateways[min(len(bodies), len(gateways)) - 1]:
            await send(message)

    async def receive() -> Any:
        return next(coming)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": []}
    asyncio.run(repeat.Repeated(gateway)(scope, receive, send))
    return bodies, sent


@pytest.mark.parametrize("reads", [1, 2])
def test_a_request_without_an_answer_goes_to_the_next_gateway_whole(reads: int) -> None:
    whole = [START, {"type": "http.response.body", "body": b"yes"}]
    bodies, sent = play([[], [], whole], reads)
    assert bodies == [b"ab"[:reads]] * 3
    assert sent == whole


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, repeat._MAX_TRIES),
        ({"method": "GET", "path": "/other"}, repeat._MAX_TRIES),
        ({"path": "/other"}, 1),
        ({"left": True, "reads": 3}, 1),
    ],
    ids=["chat", "harmless", "others", "left"],
)
def test_what_may_change_something_or_nobody_waits_for_is_asked_once(
    options: dict[str, Any], times: int
) -> None:
    bodies, sent = play([[]], **options)
    assert len(bodies) == times
    statuses = [message["status"] for message in sent if "status" in message]
    assert statuses == ([503] if times > 1 else [])


def test_an_answer_that_has_begun_is_not_asked_again_and_a_stream_says_so() -> None:
    piece = {"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True}
    bodies, sent = play([[STREAM, piece]])
    assert len(bodies) == 1
    assert sent[:2] == [STREAM, piece]
    assert json.loads(sent[2]["body"].removeprefix(b"data: "))["error"]["message"] == "the answer broke off"
    assert not sent[2]["more_body"]
    bodies, sent = play([[START, piece]])
    assert (len(bodies), sent) == (1, [START, piece])


def test_serve_finds_it() -> None:
    """The path is what proxies are told in their environment."""
    (path,) = repeat.CALLBACK.values()
    find: Callable[[str], Any] = call_function_from_import_path
    (found,) = validate_http_proxy_callback_return(find(path))
    assert found.cls is repeat.Repeated
