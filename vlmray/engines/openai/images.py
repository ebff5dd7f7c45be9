"""Images as a server takes them: any image as a data URI of a kind that all of them read."""

from __future__ import annotations

import base64
import functools
import math
from dataclasses import dataclass

from PIL import Image

from vlmray.images.decoding import decode_image, encode_png, image_size, plain_type


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelBounds:
    """Pixels of an image, width times height: it is scaled to them before it is sent."""

    least: int | None = None
    most: int | None = None

    def factor(self, size: tuple[int, int]) -> float:
        """Return by what the sides of an image of this size are multiplied."""
        num_pixels = math.prod(size)
        wanted = max(self.least or 0, min(num_pixels, self.most or num_pixels))
        return math.sqrt(wanted / num_pixels)


def to_url(image: Image.Image | bytes | str, bounds: PixelBounds) -> str:
    """Return a URL as it is, and anything else as a data URI.

    Files that every reader shows alike travel as they are; others (turned by EXIF, with transparency, of rare
    kinds) as the upright RGB that engines here see.

    Raises:
        ValueError: It cannot be decoded.
    """
    if isinstance(image, str):
        return image
    if isinstance(image, bytes):
        return _encode(image, bounds)  # rows about one image follow each other
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image of a request is a {type(image).__name__}")
    return _data_uri(encode_png(_scaled(image, bounds)), "image/png")


@functools.lru_cache(maxsize=8)
def _encode(data: bytes, bounds: PixelBounds) -> str:
    kind = plain_type(data)
    if kind is not None and bounds.factor(image_size(data)) == 1:
        return _data_uri(data, kind)
    return _data_uri(encode_png(_scaled(decode_image(data), bounds)), "image/png")


def _scaled(image: Image.Image, bounds: PixelBounds) -> Image.Image:
    factor = bounds.factor(image.size)
    if factor == 1:
        return image
    rounded = math.floor if factor < 1 else math.ceil
    size = [max(1, rounded(side * factor)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
