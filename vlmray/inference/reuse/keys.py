"""What an answer depends on, as a key: rows with the same one have the same answer."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from vlmray.schema import GenerationRequest

_NAMES = tuple(field.name for field in dataclasses.fields(GenerationRequest) if field.name != "request_id")


def request_key(request: GenerationRequest, settings: str | None = None) -> bytes | None:
    """Return 32 bytes that are another's only if it asks the same; None for a sampled answer.

    Everything that an engine is told counts, images by their bytes, or their URLs where the server fetches
    them. A sampled answer is that of one row: it depends on its id.

    Args:
        request: What is asked.
        settings: What the row says itself of its answer, which says also what is written of it.
    """
    if request.temperature > 0:
        return None
    found = hashlib.sha256(repr(settings).encode())
    for name in _NAMES:
        found.update(repr((name, _plain(getattr(request, name)))).encode())
    return found.digest()


def _plain(value: Any) -> Any:
    """Return a value of which `repr` says all, with a digest in the place of each image."""
    if not isinstance(value, list):
        return value
    return [hashlib.sha256(each).digest() if isinstance(each, bytes) else _no_picture(each) for each in value]


def _no_picture(value: Any) -> Any:
    """Return a message or a URL; what is decoded already has no bytes of its own.

    Raises:
        TypeError: It is a picture.
    """
    if not isinstance(value, str | dict):
        raise TypeError(f"images are told apart by their bytes, got {type(value).__name__}")
    return value
