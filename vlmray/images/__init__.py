"""Anything that is called an image, as upright RGB, safely."""

from vlmray._lazy import offer

__getattr__, __dir__ = offer(
    __name__,
    {
        "ImageError": "decoding",
        "load_image_pil": "reading",
    },
)
