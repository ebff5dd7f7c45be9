"""Grey of more than 8 bits, missing data in it, and transparent shades: what comes out is what was meant."""

from __future__ import annotations

import io
import re
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from helpers.processes import png
from vlmray.images.decoding import ImageError, decode_image


@pytest.mark.parametrize(
    ("depth", "kind", "row", "key", "shades"),
    [
        (1, 0, b"\xa0", (0,), [255] * 8),
        (2, 0, b"\x1b", (1,), [0, 255, 170, 255]),
        (4, 0, b"\x07\x11", (7,), [0, 255, 17, 17]),
        (8, 0, b"\0\x07", (7,), [0, 255]),
        (16, 0, struct.pack(">2H", 0x0107, 7), (7,), [1, 255]),
        (16, 2, struct.pack(">6H", *[0x3412] * 3, *[0x1234] * 3), (0x1234,) * 3, [0x34, 255]),
    ],
)
def test_the_transparent_shade_of_a_png_is_white_at_every_depth(
    depth: int, kind: int, row: bytes, key: tuple[int, ...], shades: list[int]
) -> None:
    decoded = decode_image(png(len(shades), 1, depth, kind, b"\0" + row, struct.pack(f">{len(key)}H", *key)))
    assert [decoded.getpixel((x, 0))[0] for x in range(len(shades))] == shades  # type: ignore[index]


_RAMP = np.tile(np.linspace(0, 1, 90, dtype=np.float32), (60, 1))


def _tiff(values: Any, no_data: str | None = None) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    if no_data is not None:
        tags.tagtype[42113] = 2
        tags[42113] = no_data
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo=tags)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("missing", "declared"),
    [
        (np.nan, None),
        (np.inf, None),
        (-np.inf, None),
        (np.nan, "nan"),
        (-9999, "-9999"),
        (-3.4028235e38, "-3.4028234663852886e+38"),
        (0.123, "0.123"),
    ],
)
def test_pixels_without_a_value_are_white_and_change_no_other(missing: float, declared: str | None) -> None:
    values = _RAMP.copy()
    values[0, :3] = missing
    whole, holed = (np.asarray(decode_image(_tiff(*each)))[..., 0] for each in ((_RAMP,), (values, declared)))
    assert (holed[0, :3] == 255).all()
    assert (holed[1:] == whole[1:]).all()
    assert (holed[0, 3:] == whole[0, 3:]).all()
    assert whole.min() == 0


@pytest.mark.parametrize(
    ("values", "marks"),
    [
        (_RAMP, [-9999]),
        (_RAMP, [-3.4028235e38]),
        (_RAMP, [-9999, -9998]),
        (_RAMP, [-1e6, 1e6]),
        (_RAMP * 3000, [-9999]),
        ((_RAMP * 3000).astype(np.int32), [-32768]),
        ((_RAMP * 3000).astype(np.int32), [-(2**31)]),
    ],
)
def test_marks_of_missing_data_that_nobody_declared_are_an_error(values: Any, marks: list[float]) -> None:
    marked = values.copy()
    marked[0, : len(marks)] = marks
    with pytest.raises(ImageError, match=f"beside {re.escape(f'{marks[0]:g}')}.*GDAL_NODATA") as caught:
        decode_image(_tiff(marked))
    assert "\n" not in str(caught.value)


def test_an_image_without_any_value_is_an_error() -> None:
    with pytest.raises(ImageError, match="no pixel with a value"):
        decode_image(_tiff(np.full((2, 2), np.nan, np.float32)))


@pytest.mark.parametrize("values", [_RAMP * 2 - 1, _RAMP * 1e30, np.where(_RAMP > 0.5, _RAMP, -1)])
def test_any_range_without_marks_is_stretched(values: Any) -> None:
    levels = np.asarray(decode_image(_tiff(values.astype(np.float32))))
    assert (levels.min(), levels.max()) == (0, 255)


def test_unsigned_integers_of_32_bits_are_not_taken_for_signed() -> None:
    data = _tiff(np.array([[0, 2**31 - 1, -1]], np.int32)).replace(
        struct.pack("<HHII", 339, 3, 1, 2), struct.pack("<HHII", 339, 3, 1, 1)
    )
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == [0, 128, 255]
