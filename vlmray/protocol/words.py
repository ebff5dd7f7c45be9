"""What is wrong with a request, in people's words, and where: `messages[0].content[1].image_url`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MARK = "<"
"""What the names of a union's branches begin with: they are ours, no client wrote them."""


def explain(error: Mapping[str, Any]) -> tuple[str, str]:
    """Return what a pydantic error says as a sentence, and the path of what it is about.

    Args:
        error: One of `ValidationError.errors()`.
    """
    path = path_of(error["loc"])
    cause = error.get("ctx", {}).get("error")
    if cause is not None:
        return f"{path} {cause}", path
    if error["type"] == "missing":
        return f"{path} is missing", path
    words = str(error["msg"]).replace("Input should", "should").replace("a valid dictionary", "an object")
    return f"{path} {words.replace('a valid ', 'a ')}, got {describe(error['input'])}"[:500], path


def path_of(loc: tuple[int | str, ...]) -> str:
    """Write where something is in a body as JavaScript would."""
    parts = [part for part in loc if not str(part).startswith(MARK)]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return path.lstrip(".")[:200]


def describe(value: Any) -> str:
    """Say what a JSON value is; texts and numbers that are short, as they are."""
    match value:
        case None | True | False:
            return {None: "null", True: "true", False: "false"}[value]
        case int() | float():
            return str(value) if abs(value) < 1e20 else "a number that is too large"
        case str():
            return repr(value) if len(value) <= 60 else f"a text of {len(value)} characters"
        case list():
            return "a list"
    return "an object"
