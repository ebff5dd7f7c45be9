"""Images: every kind of source and mode arrives as upright RGB, every defect as one named error."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from helpers.processes import huge_png
from vlmray.images.decoding import FORMATS, ImageError, decode_image, encode_jpeg
from vlmray.images.reading import load_image_pil, read_image_bytes

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def _encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _picture() -> Image.Image:
    """Draw 4 x 2 pixels, red in the top left corner and blue elsewhere."""
    image = Image.new("RGB", (4, 2), BLUE)
    image.putpixel((0, 0), RED)
    return image


def _noise(size: int = 64) -> Image.Image:
    return Image.effect_noise((size, size), 80).convert("RGB")


PNG = _encode(_picture())


# Sources


def _sources(folder: Path) -> dict[str, object]:
    path = folder / "a chart.png"
    path.write_bytes(PNG)
    text = base64.b64encode(PNG).decode()
    return {
        "pil": _picture(),
        "bytes": PNG,
        "bytearray": bytearray(PNG),
        "memoryview": memoryview(PNG),
        "path": path,
        "path as text": str(path),
        "file url": path.as_uri(),
        "data uri": f"data:image/png;base64,{text}",
        "data uri with parameters": f"DATA:image/png;name=x;BASE64,{text}",
        "data uri, percent-encoded base64": f"data:image/png;base64,{quote(text, safe='')}",
        "data uri, no padding": f"data:;base64,{text.rstrip('=')}",
        "data uri, line breaks": f"data:;base64,{text[:20]}\n{text[20:]}",
        "data uri, URL alphabet": f"data:;base64,{base64.urlsafe_b64encode(PNG).decode()}",
        "data uri, percent-encoded": f"data:image/png,{quote(PNG)}",
        "dict with bytes": {"bytes": PNG, "path": "gone.png"},
        "dict with path": {"bytes": None, "path": str(path)},
    }


def test_every_source_gives_the_same_image(tmp_path: Path) -> None:
    for name, source in _sources(tmp_path).items():
        image = load_image_pil(source)
        assert (image.mode, image.size) == ("RGB", (4, 2)), name
        assert image.tobytes() == _picture().tobytes(), name


def test_every_source_gives_bytes_that_decode_alike(tmp_path: Path) -> None:
    for name, source in _sources(tmp_path).items():
        data = read_image_bytes(source)
        assert isinstance(data, bytes), name
        assert decode_image(data).tobytes() == _picture().tobytes(), name
        assert data == PNG or name == "pil"


def test_relative_paths_start_from_base_dir(tmp_path: Path) -> None:
    (tmp_path / "chart.png").write_bytes(PNG)
    for source in ("chart.png", Path("chart.png"), {"path": "chart.png"}):
        assert load_image_pil(source, base_dir=tmp_path).size == (4, 2)
    with pytest.raises(ImageError, match=r"no such file: chart\.png"):
        load_image_pil("chart.png")


def test_rgb_pil_image_comes_back_as_it_is() -> None:
    image = _picture()
    assert load_image_pil(image) is image


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "unsupported image source NoneType; expected a PIL image, bytes, URL, path"),
        (7, "unsupported image source int"),
        ({}, "neither bytes nor path"),
        ({"bytes": None, "path": None}, "neither bytes nor path"),
        ({"bytes": b"", "path": "x.png"}, "image has 0 bytes"),
        ({"bytes": {"bytes": PNG}}, "unsupported image source dict"),
        (b"", "image has 0 bytes"),
        ("", "empty string"),
        ("data:image/png;base64,", "image has 0 bytes"),
        ("data:image/png", "data URI has no comma"),
        ("data:image/png;base64,a$b=", "not valid base64"),
        ("data:image/png;base64,abcde", "not valid base64"),
        ("gone.png", r"no such file: gone\.png"),
        ("file:///gone.png", "no such file: /gone.png"),
        ("file://elsewhere/a.png", "another host 'elsewhere'"),
        ("a\0b.png", r"cannot read file 'a\\x00b\.png'"),
        ("a\nb.png", r"no such file: 'a\\nb\.png'"),
        ("x" * 5000, "cannot read file xxx.*: File name too long"),
        ("/dev/zero", "not a regular file: /dev/zero"),
        (Path("/"), "not a regular file: /"),
        ("ftp://host/a.png", "unsupported URL scheme 'ftp'; expected http, https, data or a path"),
        ("s3://bucket/a.png", "unsupported URL scheme 's3'"),
        ("http://", "cannot fetch http://"),
        ("http://host:port/a.png", "cannot fetch http://host:port/a.png"),
        ("http://[::1/a.png", "cannot fetch"),
        (b"<!DOCTYPE html>", r"cannot identify image \(first bytes b'<!DOCTYPE ht'\); expected JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "cannot identify image"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_bad_sources_are_named(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_image_pil(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_max_bytes_holds_for_every_source(tmp_path: Path) -> None:
    for name, source in _sources(tmp_path).items():
        if name != "pil":
            with pytest.raises(ImageError, match=r"image of \d+ bytes or more exceeds the limit of 40 bytes"):
                read_image_bytes(source, max_bytes=40)
        assert read_image_bytes(source, max_bytes=len(PNG))


def test_urls_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chart.png").write_bytes(PNG)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/chart.png"
            assert load_image_pil(url).tobytes() == _picture().tobytes()
            assert read_image_bytes({"bytes": None, "path": url}) == PNG
            with pytest.raises(ImageError, match="exceeds the limit of 40 bytes"):
                read_image_bytes(url, max_bytes=40)
            with pytest.raises(ImageError, match="HTTP 404 for http://"):
                read_image_bytes(url + ".gone")
        finally:
            server.shutdown()
            thread.join()


def test_address_check_and_timeout_reach_the_fetch() -> None:
    with pytest.raises(ImageError, match=r"127\.0\.0\.1 is not a public address"):
        load_image_pil("http://127.0.0.1:9/a.png", public_only=True)
    with pytest.raises(ImageError, match="no complete answer in 0 s"):
        load_image_pil("http://127.0.0.1:9/a.png", timeout_s=0)


# Decoding


@pytest.mark.parametrize("image_format", [name for name in FORMATS if name != "GIF"])
def test_formats(image_format: str) -> None:
    image = decode_image(_encode(_picture().resize((32, 16), 0), image_format))
    assert (image.mode, image.size) == ("RGB", (32, 16))
    assert image.getpixel((31, 15))[2] > 200  # type: ignore[index]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_truncated_images_are_found(image_format: str) -> None:
    data = _encode(_noise(), image_format)
    with pytest.raises(ImageError) as caught:
        decode_image(data[: len(data) * 2 // 3])
    assert "truncated" in str(caught.value) or image_format in ("WEBP", "TIFF")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_never_raise_anything_else() -> None:
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = _encode(_noise(16), image_format)
        for position in range(0, len(data), max(1, len(data) // 60)):
            damaged = data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]
            with contextlib.suppress(ImageError):  # Many a damaged image still decodes.
                assert decode_image(damaged).mode == "RGB"


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("level", [0, 255])
def test_modes_keep_black_and_white(mode: str, level: int) -> None:
    image = load_image_pil(Image.new("RGB", (2, 2), (level,) * 3).convert(mode))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (level,) * 3


def test_cmyk_jpeg() -> None:
    data = _encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = decode_image(data).getpixel((8, 8))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(image_format: str) -> None:
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 32768, 65535)):
        image.putpixel((x, 0), value)
    decoded = decode_image(_encode(image, image_format))
    assert [decoded.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]


@pytest.mark.parametrize(
    ("mode", "values"), [("I", (-5, 0, 5)), ("F", (0.0, 0.5, 1.0)), ("F", (7.0, 7.0, 7.0))]
)
def test_deep_grey_of_unknown_range_is_stretched(mode: str, values: tuple[float, ...]) -> None:
    image = Image.new(mode, (3, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    levels = [load_image_pil(image).getpixel((x, 0))[0] for x in range(3)]  # type: ignore[index]
    assert levels == ([0, 128, 255] if len(set(values)) > 1 else [0, 0, 0])


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    half = Image.new("LA", (2, 2), (0, 128))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert decode_image(_encode(clear)).getpixel((0, 0)) == WHITE
    assert decode_image(_encode(half)).getpixel((0, 0)) == (127, 127, 127)
    assert decode_image(_encode(palette, transparency=0)).getpixel((0, 0)) == WHITE
    assert decode_image(_encode(palette, transparency=b"\x00\xff")).getpixel((0, 0)) == WHITE
    assert decode_image(_encode(palette, "GIF", transparency=0)).getpixel((0, 0)) == WHITE
    assert decode_image(_encode(Image.new("RGB", (2, 2), RED), transparency=RED)).getpixel((0, 0)) == WHITE
    assert decode_image(_encode(Image.new("L", (2, 2), 9), transparency=9)).getpixel((0, 0)) == WHITE


def test_pixels_that_hide_all_stay_as_they_are_beside_one_that_does_not() -> None:
    opaque = Image.effect_noise((8, 8), 90).convert("RGBA")
    assert decode_image(_encode(opaque)) == opaque.convert("RGB")
    opaque.putpixel((0, 0), (255, 0, 0, 0))
    decoded = decode_image(_encode(opaque))
    assert decoded.getpixel((0, 0)) == WHITE
    decoded.putpixel((0, 0), RED)
    assert decoded == opaque.convert("RGB")


def test_transparent_16_bit_grey_has_no_transparency_left() -> None:
    image = Image.new("I;16", (2, 1), 40_000)
    image.putpixel((1, 0), 156)  # what the other comes to in 8 bits
    decoded = decode_image(_encode(image, transparency=40_000))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [WHITE, (1, 1, 1)]


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_only_the_first_frame_counts(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    data = _encode(frames[0], image_format, save_all=True, append_images=frames[1:])
    red, _, blue = decode_image(data).getpixel((4, 4))  # type: ignore[misc]
    assert red > 200 > 50 > blue


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """The value says in which corner the stored top left pixel is seen."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(_encode(_picture(), exif=exif))
    width, height = (4, 2) if orientation < 5 else (2, 4)
    right, bottom = width - 1, height - 1
    corners = [(0, 0), (right, 0), (right, bottom), (0, bottom)] * 2
    assert image.size == (width, height)
    assert image.getpixel(corners[orientation - 1]) == RED
    assert load_image_pil(image).tobytes() == image.tobytes(), "turned twice"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_does_not_cost_the_image() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):
        assert decode_image(_encode(_picture(), "JPEG", exif=exif)).size == (4, 2)


# Limits on pixels


def test_too_many_pixels_are_refused_from_the_header() -> None:
    with pytest.raises(ImageError, match="image of 9000x9000 pixels exceeds the limit of 64000000 pixels"):
        decode_image(huge_png(9000, 9000))
    with pytest.raises(ImageError, match="image of 4x2 pixels exceeds the limit of 7 pixels"):
        load_image_pil(_picture(), max_pixels=7)
    assert load_image_pil(PNG, max_pixels=8).size == (4, 2)


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_pillows_own_limit_gives_the_same_error(side: int) -> None:
    """Pillow warns from 89 million pixels, and raises from twice that or where warnings are errors."""
    limit = Image.MAX_IMAGE_PIXELS
    expected = f"image of {side**2} pixels exceeds the limit of 64000000 pixels"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=expected):
            decode_image(huge_png(side, side))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_images_without_pixels() -> None:
    with pytest.raises(ImageError):
        decode_image(huge_png(0, 5))
    with pytest.raises(ImageError, match="image of 0x5 pixels is empty"):
        load_image_pil(Image.new("RGB", (0, 5)))


# JPEG


def test_plain_jpegs_pass_unchanged() -> None:
    for image in (_noise(), _noise().convert("L")):
        data = _encode(image, "JPEG", quality=70)
        assert encode_jpeg(data) is data


def test_everything_else_becomes_a_plain_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = _picture().resize((32, 32), 0)
    sources: list[Image.Image | bytes] = [
        picture,
        _encode(picture),
        _encode(picture.convert("RGBA")),
        _encode(picture, "JPEG", progressive=True),
        _encode(picture.convert("CMYK"), "JPEG"),
        _encode(picture, "JPEG", exif=exif),
    ]
    for source in sources:
        data = encode_jpeg(source)
        assert encode_jpeg(data) is data
        assert data != source
        red, _, blue = decode_image(data).getpixel((16, 16))  # type: ignore[misc]
        assert blue > 200 > 50 > red
    assert decode_image(encode_jpeg(_encode(_picture(), "JPEG", exif=exif))).size == (2, 4)


def test_jpeg_of_nothing_is_an_image_error() -> None:
    for data in (b"", b"text"):
        with pytest.raises(ImageError):
            encode_jpeg(data)
