"""Rows that bring a conversation: OpenAI's and TRL's `messages`, LLaVA's and ShareGPT's `conversations`.

    turns, images, system prompt -> read_conversation -> Conversation: messages with places, their images

A turn is `{"role", "content"}` or `{"from", "value"}`, or two as `{"human", "assistant"}`. Content is a text,
with marks such as `<image>` for the row's images, or a list of parts. Images that parts hold themselves stay
where they are; places without one take the row's images in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vlmray.dataset.chat.marks import NO_VIDEO, check_counts, split_at_marks
from vlmray.dataset.text.values import as_text, check_text, name_kind

Image = bytes | str

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant",
}  # fmt: skip
_KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))
_PAIRS = (("system", "system"), ("human", "user"), ("user", "user"), ("assistant", "assistant"))
_TEXTS = ("text", "input_text")
_IMAGES = ("image", "image_url", "input_image")
_SOURCES = ("image", "image_url", "url", "path", "base64", "data")


class Conversation(NamedTuple):
    """Messages whose parts are texts and `{"type": "image"}`, and an image for each of these."""

    messages: list[dict[str, Any]]
    images: list[Image]


def is_conversation(value: Any) -> bool:
    """Tell whether a value is a list of turns."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(turn, Mapping) and _is_turn(turn) for turn in value)
    )


def _is_turn(turn: Mapping[str, Any]) -> bool:
    names = {name for name, value in turn.items() if value is not None}
    return any(role in names and content in turn for role, content in _KEYS) or bool(
        names and names <= {name for name, _ in _PAIRS}
    )


def read_conversation(
    turns: Sequence[Mapping[str, Any]], images: Sequence[Image] = (), *, system: str | None = None,
    has_marks: bool = True,
) -> Conversation:  # fmt: skip
    """Read a row's conversation.

    Args:
        turns: As the row has them.
        images: Those of the row's image column.
        system: The row's system prompt, where it is not one of the turns.
        has_marks: Whether `<image>` in a text is the place of an image.

    Raises:
        ValueError: Something in it is not understood, or it has not as many images as places.
    """
    messages = [_read_message(role, content) for turn in turns for role, content in _read_turn(turn)]
    if system and messages[0]["role"] != "system":
        messages.insert(0, _read_message("system", system))
    if has_marks and not any(map(_holds_image, messages)):
        messages = [_with_places(message) for message in messages]
    if images and not any(map(_holds_image, messages)):
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"][:0] = [{"type": "image"} for _ in images]
    return Conversation(messages, list(_take_images(messages, images)))


def embedded_images(turns: Sequence[Mapping[str, Any]]) -> list[Image]:
    """Return the images that the parts of a conversation hold; none where it cannot be read."""
    try:
        return read_conversation(turns, has_marks=False).images
    except ValueError:
        return []


def _read_turn(turn: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for role, content in _KEYS:
        if turn.get(role) is not None and content in turn:
            yield _read_role(turn, str(turn[role])), turn[content]
            return
    yield from ((role, turn[name]) for name, role in _PAIRS if turn.get(name) is not None)


def _read_role(turn: Mapping[str, Any], role: str) -> str:
    calls = next((name for name in ("tool_calls", "function_call") if turn.get(name)), None)
    if role not in _ROLES or calls:
        found = f"a turn with {calls}" if calls else f"a turn of role {role!r}"
        raise ValueError(f"the conversation has {found}; system, user and assistant are supported")
    return _ROLES[role]


def _read_message(role: str, content: Any) -> dict[str, Any]:
    parts = content if isinstance(content, list | tuple) else [content]
    return {"role": role, "content": [found for part in parts for found in _read_part(role, part)]}


def _read_part(role: str, part: Any) -> Iterator[dict[str, Any]]:
    """Yield a text, or the place of an image with what its source is, which is taken out later."""
    if not isinstance(part, Mapping):
        yield {"type": "text", "text": check_text(as_text(part) or "")}
        return
    filled = {name: value for name, value in part.items() if value is not None}
    kind = str(
        filled.get("type") or next((name for name in (*_TEXTS, *_SOURCES) if name in filled), "nothing")
    )
    if "video" in kind:
        raise ValueError(NO_VIDEO)
    if kind in _TEXTS:
        yield {"type": "text", "text": check_text(as_text(filled.get("text")) or "")}
    elif kind in (*_IMAGES, *_SOURCES):
        if role != "user":
            raise ValueError(f"a turn of role {role} holds an image; only those of the user may")
        sources = (filled[name] for name in _SOURCES if name in filled)
        yield {"type": "image", "source": next((each for each in sources if not _is_empty(each)), None)}
    else:
        raise ValueError(f"a turn has a part of type {kind!r}; expected text or image")


def _is_empty(source: Any) -> bool:
    """Tell whether a typed column has nothing here."""
    return isinstance(source, Mapping) and all(value is None for value in source.values())


def _holds_image(message: Mapping[str, Any]) -> bool:
    return any(part["type"] == "image" for part in message["content"])


def _with_places(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] != "user":
        return message
    texts = [part["text"] for part in message["content"]]
    return {**message, "content": [part for text in texts for part in split_at_marks(text)]}


def _take_images(messages: Sequence[Mapping[str, Any]], images: Sequence[Image]) -> Iterator[Image]:
    """Take the sources out of the places of images, and yield an image for each."""
    places = [part for message in messages for part in message["content"] if part["type"] == "image"]
    sources = [part.pop("source", None) for part in places]
    check_counts(sources.count(None), len(images))
    rest = iter(images)
    return (next(rest) if source is None else _read_source(source) for source in sources)


def _read_source(source: Any) -> Image:
    """Return what an image is read from: itself, or what `{"url"}` or `{"bytes", "path"}` say."""
    if isinstance(source, Mapping):
        names = ("bytes", "path", "url")
        source = next((source[name] for name in names if source.get(name) is not None), source)
    if not isinstance(source, bytes | str):
        raise ValueError(f"expected an image or the name of one, got {name_kind(source)}")
    return source
