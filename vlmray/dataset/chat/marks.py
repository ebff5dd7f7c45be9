"""Marks in a text where its images belong, as other tools write them: `<image>`, `<image 2>`, `<|image|>`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

_MARK = re.compile(
    r"<\|?image(?:[ _-]?(?P<number>\d+)|[ _-]?(?:placeholder|token))?\|?>|<ImageHere>", re.IGNORECASE
)

NO_VIDEO = "the row has a video, and video is not supported; give its frames as images"


def find_mark(text: str) -> str | None:
    """Return the first mark in a text, if it has one."""
    found = _MARK.search(text)
    return found and found[0]


def count_marks(text: str) -> int:
    """Count the marks in a text."""
    return sum(1 for _ in _MARK.finditer(text))


def without_outer_mark(text: str) -> str:
    """Take away the one mark of a text that stands before or after it: its image comes first anyway."""
    if count_marks(text) != 1:
        return text
    inner, rest = text.strip(), _MARK.sub("", text).strip()
    return rest if inner.startswith(rest) or inner.endswith(rest) else text


def choose_images(texts: Sequence[str], images: Sequence[Any]) -> tuple[Any, ...]:
    """Return the images that are shown, in order: those that numbered marks call for, else all.

    >>> choose_images(["Is <image 2> larger than <image 1>?"], ["a", "b", "c"])
    ('b', 'a')

    Raises:
        ValueError: A number for which there is no image.
    """
    marks = [mark for text in texts for mark in _MARK.finditer(text)]
    if not images or not marks or not all(mark["number"] for mark in marks):
        return tuple(images)
    for mark in marks:
        if not 1 <= int(mark["number"]) <= len(images):
            raise ValueError(f"the text has {mark[0]!r}, and {_count(len(images))}")
    return tuple(images[int(mark["number"]) - 1] for mark in marks)


def place_images(text: str, num_images: int) -> list[dict[str, Any]]:
    r"""Cut a text at its marks, for the parts of a message; without any, its images come first.

    White space between marks is left out, and next to those that the text begins or ends with.

    >>> [part.get("text", "image") for part in place_images("<image>\nIs it <image> or <image>?", 3)]
    ['image', 'Is it ', 'image', ' or ', 'image', '?']

    Raises:
        ValueError: It has another number of marks.
    """
    num_marks = count_marks(text) if num_images else 0
    if not num_marks:
        return [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}]
    check_counts(num_marks, num_images)
    return split_at_marks(text)


def check_counts(num_places: int, num_images: int) -> None:
    """Refuse places and images that are not as many.

    Raises:
        ValueError: They are not.
    """
    if num_places != num_images:
        places = "place for an image" if num_places == 1 else "places for images"
        raise ValueError(f"the text has {num_places} {places}, and {_count(num_images)}")


def split_at_marks(text: str) -> list[dict[str, Any]]:
    """Return the parts of a message: texts, and the places of images between them."""
    texts = _texts_between(text)
    filled = [at for at, piece in enumerate(texts) if piece.strip()]
    parts: list[dict[str, Any]] = []
    for at, piece in enumerate(texts):
        if at:
            parts.append({"type": "image"})
        if at in filled:
            piece = piece.lstrip() if 0 < at == filled[0] else piece
            piece = piece.rstrip() if filled[-1] == at < len(texts) - 1 else piece
            parts.append({"type": "text", "text": piece})
    return parts


def _texts_between(text: str) -> list[str]:
    ends = [(0, 0), *(mark.span() for mark in _MARK.finditer(text)), (len(text), len(text))]
    return [text[before[1] : after[0]] for before, after in pairwise(ends)]


def _count(num_images: int) -> str:
    return f"the row has {num_images} image{'' if num_images == 1 else 's'}"
