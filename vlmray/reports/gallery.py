"""Answered samples with their images, as reports show them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageOps

from vlmray.reports.text import read_number
from vlmray.schema import Row

Verdict = Literal["wrong", "partial", "failed", "right", "unscored"]

VERDICT_LABELS: dict[Verdict, tuple[str, str]] = {
    "wrong": ("✕", "Wrong"),
    "partial": ("◐", "Partly right"),
    "failed": ("!", "Failed"),
    "right": ("✓", "Right"),
    "unscored": ("–", "Not scored"),
}

THUMBNAIL_MAX_BYTES = 45_000
"""60 thumbnails of this size make 3.6 MB of base64, so a full gallery stays below 4 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryItem:
    """One sample as a card: what was asked, what is accepted, what the model said."""

    sample_id: str
    question: str
    answers: tuple[str, ...] = ()
    prediction: str | None = None
    score: float | None = None
    error: str | None = None
    family: str | None = None
    images: tuple[bytes, ...] = ()
    """Encoded images of any size; the page carries thumbnails."""

    num_completion_tokens: int | None = None
    beside: tuple[tuple[str, str], ...] = ()
    """Names and texts of what else was said of it, by another model say."""

    @property
    def verdict(self) -> Verdict:
        """Name the outcome."""
        return verdict_of(self.score, self.error)

    @classmethod
    def from_row(cls, row: Row, images: Sequence[bytes] = ()) -> GalleryItem:
        """Make the card of a result row, whose columns have the names of the fields."""
        answers = row.get("answers")
        return cls(
            sample_id=row["sample_id"],
            question=row.get("question") or "",
            answers=() if answers is None else tuple(answers),
            prediction=row.get("prediction"),
            score=read_number(row.get("score")),
            error=row.get("error"),
            family=row.get("family"),
            images=tuple(images),
            num_completion_tokens=row.get("num_completion_tokens"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gallery:
    """Cards with filters by verdict and family."""

    title: str
    items: tuple[GalleryItem, ...]
    note: str = ""


def verdict_of(score: float | None, error: str | None) -> Verdict:
    """Name the outcome of a row: a score strictly between 0 and 1 is partly right."""
    if error is not None:
        return "failed"
    if score is None:
        return "unscored"
    if score <= 0:
        return "wrong"
    return "right" if score >= 1 else "partial"


# ---------------------------------------------------------------------------------------------
# Thumbnails
# ---------------------------------------------------------------------------------------------


def thumbnail_data_uri(
    image: bytes, *, max_width: int = 480, max_bytes: int = THUMBNAIL_MAX_BYTES
) -> str | None:
    """Encode an image as a small data URI, PNG or JPEG, whichever is smaller.

    Args:
        image: Encoded image bytes, of any format Pillow reads.
        max_width: Pixels; the height is at most one and a half times that.
        max_bytes: Encoded size to aim for; quality and then size give way.

    Returns:
        The data URI, or None where the bytes are not a readable image.
    """
    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.draft("RGB", (2 * max_width, 3 * max_width))  # decodes large JPEGs at a lower size
            picture = _flatten(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    for scale in (1.0, 0.7, 0.4, 0.2):
        small = picture.copy()
        small.thumbnail((max(1, int(max_width * scale)), max(1, int(1.5 * max_width * scale))))
        encoded = [_encode(small, "PNG", optimize=True)]
        encoded += [_encode(small, "JPEG", quality=quality, optimize=True) for quality in (82, 60)]
        # The best that fits, else the smallest of this size, at the next scale if there is one.
        fitting = [option for option in encoded[:2] if len(option[1]) <= max_bytes]
        media_type, data = min(fitting or encoded, key=lambda option: len(option[1]))
        if len(data) <= max_bytes:
            break
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _flatten(picture: Image.Image) -> Image.Image:
    """Convert to RGB, transparent pixels over white as a browser's page would show them."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _encode(picture: Image.Image, image_format: str, **options: Any) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, **options)
    return f"image/{image_format.lower()}", buffer.getvalue()


def thumbnails(images: Sequence[bytes]) -> list[str | None]:
    """Return small copies of a card's images as data URIs, together as large as one; None for a bad one."""
    share = max(1, len(images))
    size = {"max_width": 480 // share, "max_bytes": THUMBNAIL_MAX_BYTES // share}
    return [thumbnail_data_uri(image, **size) for image in images]
