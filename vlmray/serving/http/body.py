"""The body of a request: JSON, whatever its Content-Type says, and nothing that only looks like it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi import Request

from vlmray.protocol.errors import ApiError
from vlmray.protocol.words import describe, path_of

_EXPECTED = "send a JSON object with model and messages, as Content-Type: application/json"


async def read_body(request: Request) -> dict[str, Any]:
    """Read and parse a body.

    Raises:
        ApiError: It is compressed, no JSON, no object, or holds what is no text or number.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, f"the body is sent with Content-Encoding: {encoding[:40]}; send it as it is")
    data = await request.body()
    try:
        body = parse_json(data)
    except ValueError as error:
        sent_as = request.headers.get("content-type", "")[:80]
        hint = f" (it is sent as {sent_as})" if sent_as and "json" not in sent_as else ""
        raise ApiError(400, f"the body is not JSON{hint}: {error}; {_EXPECTED}"[:600]) from error
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is {describe(body)}; {_EXPECTED}")
    path = find_surrogate(body) if b"\\ud" in data.lower() else None
    if path is not None:
        raise ApiError(400, f"{path} holds half a surrogate pair, which is no character", param=path)
    return body


def parse_json(data: bytes) -> Any:
    """Parse JSON as its standard has it: in UTF-8, without NaN, every key once.

    Raises:
        ValueError: It is not.
    """
    if not data.strip():
        raise ValueError("it is empty")
    try:
        return json.loads(
            data.decode("utf-8-sig"), parse_constant=_refuse_constant, object_pairs_hook=_make_object
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return found


def find_surrogate(body: Any) -> str | None:
    """Return the path of a text with half a character, or of the object with such a key."""
    return next((path_of(loc) for loc, text in _texts(body) if not _is_text(text)), None)


def _texts(body: Any) -> Iterator[tuple[tuple[int | str, ...], str]]:
    left: list[tuple[tuple[int | str, ...], Any]] = [((), body)]
    while left:
        loc, value = left.pop()
        if isinstance(value, str):
            yield loc, value
        elif isinstance(value, dict):
            yield from ((loc, name) for name in value)
            left += [((*loc, name), child) for name, child in value.items()]
        elif isinstance(value, list):
            left += [((*loc, place), child) for place, child in enumerate(value)]


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
