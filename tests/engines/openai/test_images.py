"""Images on their way to a server: what it decodes is what engines here see."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from helpers.engines import make_image
from vlmray.engines.openai.images import PixelBounds, to_url
from vlmray.images.decoding import ImageError, decode_image

ANY = PixelBounds()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sent(url: str) -> tuple[str, bytes]:
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return kind, base64.b64decode(data)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


PICTURE = make_image(1, (60, 40))
PLAIN = {
    "image/jpeg": encoded(PICTURE, "JPEG"),
    "image/png": encoded(PICTURE, "PNG"),
}
OTHERS = [
    encoded(PICTURE, "JPEG", exif=turned()),
    encoded(PICTURE, "JPEG", progressive=True),
    encoded(PICTURE.convert("RGBA"), "PNG"),
    encoded(PICTURE.convert("I;16"), "PNG"),
    encoded(PICTURE, "BMP"),
    encoded(PICTURE, "TIFF"),
]


@pytest.mark.parametrize("kind", PLAIN)
def test_what_everybody_reads_alike_travels_as_it_is(kind: str) -> None:
    assert sent(to_url(PLAIN[kind], ANY)) == (kind, PLAIN[kind])


@pytest.mark.parametrize("data", OTHERS)
def test_other_images_travel_as_they_are_seen_here(data: bytes) -> None:
    kind, arrived = sent(to_url(data, ANY))
    image = Image.open(io.BytesIO(arrived))  # as a server does that knows nothing of turning
    assert kind == "image/png"
    assert image.mode == "RGB"
    assert image.tobytes() == decode_image(data).tobytes()


def test_a_picture_in_memory_and_a_url_travel_too() -> None:
    assert Image.open(io.BytesIO(sent(to_url(PICTURE, ANY))[1])).tobytes() == PICTURE.tobytes()
    assert to_url("https://host/a.png", ANY) == "https://host/a.png"
    with pytest.raises(ImageError):
        to_url(b"no image", ANY)


@pytest.mark.parametrize(
    ("bounds", "size"),
    [
        (PixelBounds(most=600), (30, 20)),
        (PixelBounds(least=9600), (120, 80)),
        (PixelBounds(least=100, most=2400), (60, 40)),
        (PixelBounds(most=1), (1, 1)),
    ],
)
def test_bounds_scale_both_sides_alike(bounds: PixelBounds, size: tuple[int, int]) -> None:
    for image in (PICTURE, PLAIN["image/png"]):
        assert Image.open(io.BytesIO(sent(to_url(image, bounds))[1])).size == size
