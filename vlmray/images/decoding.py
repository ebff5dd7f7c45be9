"""Encoded bytes to upright RGB images, with every bound checked before anything is decoded.

Whatever is wrong with an image is an `ImageError` with one line that says what was found.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Default limit on width x height: 8000 x 8000, 192 MB once decoded."""

MAX_BYTES = 50 * 2**20
"""Default limit on encoded bytes."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
"""Pillow decoders that may run: no EPS or PDF, which start other programs, and no rarities."""

JPEG_QUALITY = 90

_EXIF_ORIENTATION = 0x0112
_SAMPLE_FORMAT, _GDAL_NODATA = 339, 42113  # TIFF tags
_UNSIGNED = 1
_USUAL_MARKS = frozenset(
    float(np.float32(mark))
    for mark in (-999, -9999, -99999, -32768, -(2**31), -3.4028235e38, 9999, 99999, 32767, 2**31 - 1, 1e20)
)
"""Values that stand for missing data in rasters."""
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


class ImageError(ValueError):
    """An image that cannot be read, with the reason in one line."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode bytes to an upright RGB image: the first frame, transparency on white.

    Raises:
        ImageError: The bytes are empty, truncated, too many pixels, or no image of `FORMATS`.
    """
    with _open_header(data, max_pixels) as image:
        return to_upright_rgb(image, max_pixels)


def encode_jpeg(image: Image.Image | bytes, *, max_pixels: int = MAX_PIXELS) -> bytes:
    """Encode an image as a JPEG that any reader shows alike.

    Bytes that already are a baseline RGB or grey JPEG without EXIF rotation are returned as they are:
    only their header is read.

    Raises:
        ImageError: The image cannot be decoded.
    """
    if isinstance(image, bytes) and is_plain_jpeg(image, max_pixels=max_pixels):
        return image
    if isinstance(image, bytes):
        image = decode_image(image, max_pixels=max_pixels)
    buffer = io.BytesIO()
    # Full colour resolution: halving it blurs the thin coloured lines and letters of charts.
    to_upright_rgb(image, max_pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def is_plain_jpeg(data: bytes, *, max_pixels: int = MAX_PIXELS) -> bool:
    """Return whether the header says a baseline RGB or grey JPEG without EXIF rotation.

    Raises:
        ImageError: The bytes are no image.
    """
    with _open_header(data, max_pixels) as image:
        return _is_plain_jpeg(image)


def plain_type(data: bytes) -> str | None:
    """Return the media type of a JPEG or PNG that any reader shows alike; None of all other images.

    Raises:
        ImageError: The bytes are no image.
    """
    with _open_header(data, MAX_PIXELS) as image:
        if _is_plain_jpeg(image):
            return "image/jpeg"
        return "image/png" if _is_plain_png(image) else None


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as it is seen here: upright RGB, without loss."""
    buffer = io.BytesIO()
    to_upright_rgb(image, MAX_PIXELS).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def image_size(image: Image.Image | bytes) -> tuple[int, int]:
    """Return width and height in pixels as stored, from the header alone.

    Raises:
        ImageError: The bytes are no image.
    """
    if isinstance(image, Image.Image):
        return image.size
    with _open_header(image, MAX_PIXELS) as opened:
        return opened.size


def check_num_bytes(num_bytes: int, max_bytes: int) -> None:
    """Refuse an image of more bytes than allowed."""
    if num_bytes > max_bytes:
        raise ImageError(f"image of {num_bytes} bytes or more exceeds the limit of {max_bytes} bytes")


# Decoding: bytes to RGB


def _open_header(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only, so that a small file cannot claim gigabytes."""
    if not data:
        raise ImageError("image has 0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
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


def to_upright_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    """Decode the first frame, turn it by its EXIF orientation and convert it to RGB."""
    _check_num_pixels(image, max_pixels)
    try:
        _rescale_transparency(image)
        image.load()
        return _turn_upright(_to_rgb(image), _orientation(image))
    except ImageError:
        raise
    # Decoders meet damaged data with a dozen unrelated types (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        truncated = "truncated" in str(error)
        raise ImageError(f"{'truncated image' if truncated else 'cannot decode image'}: {error}") from error


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Apply an EXIF orientation; by hand, as Pillow's helper also rewrites tags and trips on bad ones."""
    method = _UPRIGHT.get(orientation)
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


def _rescale_transparency(image: Image.Image) -> None:
    """Bring the transparent colour of a PNG to the depth that Pillow decodes its pixels to: 8 bits.

    Pillow leaves it as it is written: https://github.com/python-pillow/Pillow/issues/3130.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", []) if image.format == "PNG" else []  # none once it is decoded
    depth = tiles[0].args if tiles else None
    if isinstance(key, int) and depth in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if depth == "L;2" else 17)
    elif isinstance(key, tuple) and depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, keeping what a viewer would show."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_8_bit(image)
    if image.has_transparency_data and not _is_opaque(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_opaque(image: Image.Image) -> bool:
    """Tell whether nothing shines through, though the mode could have it: most charts are stored so."""
    return image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale deep grey values to 0..255, where Pillow's conversion would clip them to white.

    16-bit values span a known range. 32-bit integers and floats do not, so theirs is stretched. What is no
    value (not a number, infinite, declared as no data or as transparent) is white and does not count.
    """
    values = _deep_values(image)
    hidden = _without_value(image, values)
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else _range_of(values[~hidden])
    scale = 255 / (high - low) if high > low else 1.0
    deep = Image.fromarray(np.where(hidden, low, values).astype(np.float32))
    grey = deep.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
    if hidden.any():
        grey.paste(255, mask=Image.fromarray(hidden))
    return grey


def _deep_values(image: Image.Image) -> Any:
    """Return pixels as an array; Pillow reads unsigned integers of 32 bits as signed."""
    values = np.asarray(image)
    unsigned = image.mode == "I" and _tag(image, _SAMPLE_FORMAT, (_UNSIGNED,)) == (_UNSIGNED,)
    return values.view(np.uint32) if unsigned and image.format == "TIFF" else values


def _without_value(image: Image.Image, values: Any) -> Any:
    """Return which pixels hold no value."""
    hidden = ~np.isfinite(values)
    declared = str(_tag(image, _GDAL_NODATA, "")).strip(" \0")
    for key in (declared, image.info.get("transparency", "")):
        with contextlib.suppress(ValueError):  # none, or none that can be read
            hidden |= values == np.array(float(key)).astype(np.float32 if image.mode == "F" else np.float64)
    return hidden


def _tag(image: Image.Image, number: int, default: object) -> object:
    """Return a tag of a TIFF."""
    return getattr(image, "tag_v2", {}).get(number, default)


def _range_of(values: Any) -> tuple[float, float]:
    """Return the smallest and the largest value.

    Raises:
        ImageError: There is none, or the outermost ones are marks of missing data that nobody declared: usual
            ones apart from the others, or any so far off that these would come out as one shade.
    """
    if not values.size:
        raise ImageError("image has no pixel with a value: all are missing (NaN, infinite or no data)")
    distinct = np.unique(values).astype(np.float64)
    low, high = float(distinct[0]), float(distinct[-1])
    for below, above in itertools.product(range(3), repeat=2):
        others = distinct[below : len(distinct) - above]
        marks = [*distinct[:below], *distinct[len(distinct) - above :]]
        shades = 2 if _USUAL_MARKS.issuperset(marks) else 255
        if len(others) > 1 and shades * (others[-1] - others[0]) < high - low:
            found = (
                f"values from {others[0]:g} to {others[-1]:g} beside {' and '.join(f'{m:g}' for m in marks)}"
            )
            raise ImageError(
                f"image has {found}, which would leave them few shades; declare missing data by the TIFF tag "
                "GDAL_NODATA, or write NaN"
            )
    return low, high


def _is_plain_jpeg(image: Image.Image) -> bool:
    return (
        image.format == "JPEG"
        and image.mode in ("RGB", "L")
        and not image.info.get("progressive")
        and _orientation(image) == 1
    )


def _is_plain_png(image: Image.Image) -> bool:
    return (
        image.format == "PNG"
        and image.mode in ("RGB", "L", "P")
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
        and _orientation(image) == 1
    )
