"""The gallery of a page: small pictures, and a word where there is none."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image

from helpers.pages import Reader, encode_image, make_item, render
from vlmray.reports.gallery import THUMBNAIL_MAX_BYTES, thumbnail_data_uri, verdict_of


def decode_data_uri(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_verdicts() -> None:
    assert [verdict_of(score, None) for score in (0.0, 0.5, 1.0, None)] == [
        "wrong",
        "partial",
        "right",
        "unscored",
    ]
    assert verdict_of(1.0, "E") == "failed"


def test_full_gallery_of_hard_images_stays_small() -> None:
    uri = thumbnail_data_uri(encode_image((700, 500), noise=True)) or ""
    html = render(*(make_item(index, prediction="x" * 20_000) for index in range(60)))
    # The same thumbnail 60 times, counted without encoding it 60 times.
    assert len(html.encode()) + 60 * len(uri) < 4_000_000
    assert "16,000 more characters in the result files" in html


def test_text_alone_gets_no_empty_image_places() -> None:
    assert "No image" not in Reader(render(make_item())).text
    assert "No image" in Reader(render(make_item(), make_item(1, images=(encode_image((80, 60)),)))).text


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(encode_image((2000, 1200)), id="flat chart"),
        pytest.param(encode_image((900, 700), noise=True), id="noise"),
        pytest.param(encode_image((60, 4000), noise=True), id="tall"),
        pytest.param(encode_image((1, 1), mode="L"), id="one pixel"),
    ],
)
def test_thumbnails_are_bounded(image: bytes) -> None:
    uri = thumbnail_data_uri(image)
    assert uri is not None
    assert len(uri) <= THUMBNAIL_MAX_BYTES * 4 / 3 + 40
    thumbnail = decode_data_uri(uri)
    assert thumbnail.width <= 480
    assert thumbnail.height <= 720


def test_transparent_pixels_become_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(buffer, "PNG")
    uri = thumbnail_data_uri(buffer.getvalue())
    assert uri is not None
    assert decode_data_uri(uri).convert("RGB").getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("image", [b"", b"not an image", encode_image((300, 300), noise=True)[:500]])
def test_unreadable_images_are_named(image: bytes) -> None:
    assert thumbnail_data_uri(image) is None
    assert "The image cannot be read" in Reader(render(make_item(images=(image,)))).text
