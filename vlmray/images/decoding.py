"""Image sources to RGB images: bytes, path, URL, data URI, Hugging Face image dict or PIL.

    source -> read_image_bytes -> encoded bytes -> decode_image -> PIL RGB image

The two halves are separate so that encoded bytes, a hundred times smaller than tensors, can travel
between stages and be decoded on the worker that needs them. Whatever is wrong with an image is an
`ImageError` with one line that says what was found.

A server that takes sources from strangers passes `public_only` (see `fetch.py`), and hands over no paths.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import stat
import urllib.request
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from vlmray.images.fetching import URL_SCHEMES, FetchError, fetch_url, shorten_source

MAX_PIXELS = 64_000_000
"""Default limit on width x height: 8000 x 8000, 192 MB once decoded."""

MAX_BYTES = 50 * 2**20
"""Default limit on encoded bytes."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""Pillow decoders that may run: no EPS or PDF, which start other programs, and no rarities."""

JPEG_QUALITY = 90

_EXIF_ORIENTATION = 0x0112
_ORIENTATION_SOURCES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_URL_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class ImageError(ValueError):
    """An image that cannot be read, with the reason in one line."""


def load_image_pil(
    source: object,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = 10.0,
    base_dir: str | Path | None = None,
    public_only: bool = False,
) -> Image.Image:
    """Load an image from any source as RGB, upright, fully decoded.

    Args:
        source: A PIL image, encoded bytes, an http(s) URL, a path (`str`, `Path` or `file://`), a data
            URI, or a Hugging Face `{"bytes": ..., "path": ...}` dict. An RGB PIL image comes back as is.
        max_pixels: Limit on width x height, checked before decoding.
        max_bytes: Limit on the encoded size, checked while it is read.
        timeout_s: Time for the whole download, redirects included.
        base_dir: Folder that relative paths start from. Not a fence: `..` leaves it.
        public_only: Fetch URLs from public addresses alone.

    Raises:
        ImageError: The source is missing, of an unknown kind, too large, damaged, or not an image.
    """
    if isinstance(source, Image.Image):
        return _to_upright_rgb(source, max_pixels)
    data = read_image_bytes(
        source, max_bytes=max_bytes, timeout_s=timeout_s, base_dir=base_dir, public_only=public_only
    )
    return decode_image(data, max_pixels=max_pixels)


def read_image_bytes(
    source: object,
    *,
    max_bytes: int = MAX_BYTES,
    timeout_s: float = 10.0,
    base_dir: str | Path | None = None,
    public_only: bool = False,
) -> bytes:
    """Fetch the encoded bytes of an image without decoding them.

    A PIL image, which has no encoded bytes any more, is written as PNG. Arguments are those of
    `load_image_pil`.

    Raises:
        ImageError: The source is missing, empty, too large, or of an unknown kind.
    """
    if isinstance(source, dict):
        source = _from_dict(source)
    if isinstance(source, Image.Image):
        data = _to_png(source)
    elif isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, Path):
        data = _read_path(source, max_bytes, base_dir)
    elif isinstance(source, str):
        data = _read_string(source, max_bytes, timeout_s, base_dir, public_only)
    else:
        expected = "a PIL image, bytes, URL, path, data URI or {'bytes', 'path'} dict"
        raise ImageError(f"unsupported image source {type(source).__name__}; expected {expected}")
    if not data:
        raise ImageError("image has 0 bytes")
    _check_num_bytes(len(data), max_bytes)
    return data


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode bytes to an upright RGB image: the first frame, transparency on white.

    Raises:
        ImageError: The bytes are empty, truncated, too many pixels, or no image of `FORMATS`.
    """
    with _open_header(data, max_pixels) as image:
        return _to_upright_rgb(image, max_pixels)


def encode_jpeg(image: Image.Image | bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """Encode an image as a JPEG that any reader shows alike.

    Bytes that already are a baseline RGB or grey JPEG without EXIF rotation are returned as they are:
    only their header is read.

    Raises:
        ImageError: The image cannot be decoded.
    """
    if isinstance(image, bytes) and is_plain_jpeg(image, max_pixels=max_pixels):
        return image
    buffer = io.BytesIO()
    # Full colour resolution: halving it blurs the thin coloured lines and letters of charts.
    load_image_pil(image, max_pixels=max_pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def is_plain_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Return whether the header says a baseline RGB or grey JPEG without EXIF rotation.

    Raises:
        ImageError: The bytes are no image.
    """
    with _open_header(data, max_pixels) as image:
        return _is_plain_jpeg(image)


def image_size(image: Image.Image | bytes) -> tuple[int, int]:
    """Return width and height in pixels as stored, from the header alone.

    Raises:
        ImageError: The bytes are no image.
    """
    if isinstance(image, Image.Image):
        return image.size
    with _open_header(image, MAX_PIXELS) as opened:
        return opened.size


# Reading: any source to bytes


def _from_dict(source: dict[str, Any]) -> object:
    """Pick the bytes, else the path, of a Hugging Face image dict."""
    for key in ("bytes", "path"):
        if source.get(key) is not None:
            return source[key]
    raise ImageError("image dict has neither bytes nor path")


def _read_string(
    source: str,
    max_bytes: int,
    timeout_s: float,
    base_dir: str | Path | None,
    public_only: bool,
) -> bytes:
    """Read a data URI, a URL or a path."""
    if not source:
        raise ImageError("image source is an empty string")
    if source[:5].lower() == "data:":
        return _read_data_uri(source, max_bytes)
    match = _URL_SCHEME.match(source)
    if match is None:
        return _read_path(Path(source), max_bytes, base_dir)
    scheme = match[1].lower()
    if scheme == "file":
        return _read_path(_file_url_path(source), max_bytes, base_dir)
    if scheme not in URL_SCHEMES:
        raise ImageError(f"unsupported URL scheme {scheme!r}; expected http, https, data or a path")
    try:
        return fetch_url(source, max_bytes=max_bytes, timeout_s=timeout_s, public_only=public_only)
    except FetchError as error:
        raise ImageError(str(error)) from error


def _file_url_path(url: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(f"file URL names another host {parts.netloc!r}; expected file:///path")
    return Path(urllib.request.url2pathname(parts.path))


def _read_path(path: Path, max_bytes: int, base_dir: str | Path | None) -> bytes:
    """Read a regular file; anything else (a folder, a pipe, a device) might never end."""
    full_path = path if base_dir is None else Path(base_dir) / path
    shown = shorten_source(str(full_path))
    try:
        status = full_path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"not a regular file: {shown}")
        _check_num_bytes(status.st_size, max_bytes)
        with full_path.open("rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise ImageError(f"no such file: {shown}") from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name.
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"cannot read file {shown}: {reason}") from error


def _read_data_uri(uri: str, max_bytes: int) -> bytes:
    """Decode `data:[type][;base64],payload`; the type is not trusted, the decoder decides."""
    header, comma, payload = uri.partition(",")
    if not comma:
        raise ImageError(f"data URI has no comma: {shorten_source(uri)}")
    # Even base64 with every character percent-encoded takes 4 a byte: refuse before copying much more.
    _check_num_bytes(len(payload) // 4, max_bytes)
    data = unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return data
    data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(f"data URI is not valid base64: {error}") from error


def _check_num_bytes(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise ImageError(f"image of {num_bytes} bytes or more exceeds the limit of {max_bytes} bytes")


# Decoding: bytes to RGB


def _open_header(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only, so that a small file cannot claim gigabytes."""
    if not data:
        raise ImageError("image has 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        expected = ", ".join(FORMATS)
        raise ImageError(f"cannot identify image (first bytes {data[:12]!r}); expected {expected}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's own limit came first, and its message has the count but not the sides.
        found = re.search(r"\d+", str(error))
        count = found[0] if found else "too many"
        raise ImageError(f"image of {count} pixels exceeds the limit of {max_pixels} pixels") from error
    except Exception as error:  # As in `_to_upright_rgb`.
        raise ImageError(f"cannot read image header: {error}") from error
    _check_num_pixels(image, max_pixels)
    return image


def _check_num_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width < 1 or image.height < 1:
        raise ImageError(f"image of {image.width}x{image.height} pixels is empty")
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"image of {image.width}x{image.height} pixels exceeds the limit of {max_pixels} pixels"
        )


def _to_upright_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    """Decode the first frame, turn it by its EXIF orientation and convert it to RGB."""
    _check_num_pixels(image, max_pixels)
    try:
        image.load()
        return _to_rgb(_turn_upright(image))
    # Decoders meet damaged data with a dozen unrelated types (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        truncated = "truncated" in str(error)
        raise ImageError(f"{'truncated image' if truncated else 'cannot decode image'}: {error}") from error


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; by hand, as Pillow's helper also rewrites tags and trips on bad ones."""
    method = _UPRIGHT.get(_orientation(image))
    if method is None:
        return image
    upright = image.transpose(method)
    for key in _ORIENTATION_SOURCES:  # Or the next reader turns it again.
        upright.info.pop(key, None)
    return upright


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if there is none that can be read."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Broken metadata is no reason to refuse the pixels.
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, keeping what a viewer would show."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale deep grey values to 0..255, where Pillow's conversion would clip them to white.

    16-bit values span a known range. 32-bit integers and floats do not, so theirs is stretched.
    """
    is_16_bit = image.mode.startswith("I;16")
    low, high = (0, 65535) if is_16_bit else cast("tuple[float, float]", image.getextrema())
    scale = 255 / (high - low) if high > low else 1.0
    grey = image.convert("F").point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
    grey.info.pop("transparency", None)  # A deep grey value, not one of the 256.
    return grey


def _is_plain_jpeg(image: Image.Image) -> bool:
    return (
        image.format == "JPEG"
        and image.mode in ("RGB", "L")
        and not image.info.get("progressive")
        and _orientation(image) == 1
    )


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    load_image_pil(image).save(buffer, "PNG")
    return buffer.getvalue()
