"""Images in rows: which values are some, and whether the files that rows name have changed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vlmray.dataset.chat.conversations import embedded_images, is_conversation
from vlmray.dataset.registry import DatasetSpec
from vlmray.dataset.samples import read_images
from vlmray.dataset.sources import Source
from vlmray.images.decoding import ImageError, image_size
from vlmray.images.reading import is_base64_image

Kind = Literal["data", "path", "URL"]

_SUFFIX = re.compile(
    r"\S[^\n]{0,1000}\.(png|jpe?g|jfif|webp|gif|bmp|tiff?|avif|heic|heif|jp2|ppm|pgm|pnm|ico|tga)",
    re.IGNORECASE,
)
_URL = re.compile(r"https?://\S+", re.IGNORECASE)
_NAMES = re.compile(r"image|img|photo|pic|figure|screenshot|scan", re.IGNORECASE)
_ROWS_PER_READ, _ROWS_TRIED = 1024, 64


def image_kind(value: Any, column: str = "") -> Kind | None:
    """Tell how a value is an image, also as the first of a list; None where it is none.

    Args:
        value: As a source gives it.
        column: Its column, whose name tells whether a URL without a suffix is one of an image.
    """
    if isinstance(value, list):
        return next((kind for item in value if (kind := image_kind(item, column))), None)
    if isinstance(value, Mapping):
        if not value or not value.keys() <= {"bytes", "path"}:
            return None
        return "data" if value.get("bytes") is not None else image_kind(value.get("path"), column)
    if isinstance(value, bytes):
        return "data" if _is_image(value) else None
    return _kind_of_text(value, column) if isinstance(value, str) else None


def _kind_of_text(text: str, column: str) -> Kind | None:
    if text[:11].lower() == "data:image/" or is_base64_image(text):
        return "data"
    if _URL.fullmatch(text):
        path = re.split(r"[?#]", text)[0]
        return "URL" if _SUFFIX.fullmatch(path) or _NAMES.search(column) else None
    return "path" if _SUFFIX.fullmatch(text) else None


def _is_image(data: bytes) -> bool:
    try:
        return min(image_size(data)) > 0
    except ImageError:
        return False


def stamp_images(source: Source, spec: DatasetSpec, indices: Sequence[int]) -> dict[int, str]:
    """Return what tells whether the image files that rows name by path are replaced: sizes and times.

    Rows with other images are left out. Where none of some rows names a path, the others are not read.
    """
    if source.base_dir is None or not (spec.image_columns or spec.form):
        return {}
    some = indices[:: max(1, len(indices) // _ROWS_TRIED)]
    if not any(True for _ in _paths(source, spec, some)):
        return {}
    named = _paths(source, spec, indices)
    return {index: ",".join(map(_stamp, paths)) for index, paths in named}


def _paths(source: Source, spec: DatasetSpec, indices: Sequence[int]) -> Iterator[tuple[int, list[Path]]]:
    """Yield the rows that name images by path, and these."""
    columns = [*spec.image_columns, *([spec.question_column] if spec.form else [])]
    for start in range(0, len(indices), _ROWS_PER_READ):
        chunk = indices[start : start + _ROWS_PER_READ]
        for index, row in zip(chunk, source.read(chunk, columns), strict=True):
            images = [image for name in spec.image_columns for image in read_images(row[name])]
            if spec.form and is_conversation(row[spec.question_column]):
                images += embedded_images(row[spec.question_column])
            paths = [path for image in images if (path := _path(image)) is not None]
            if paths:
                yield index, [Path(source.base_dir or "", path) for path in paths]


def _path(value: Any) -> str | None:
    if not isinstance(value, str) or value[:5].lower() == "data:" or is_base64_image(value):
        return None
    parts = urlsplit(value) if "://" in value else None
    if parts is None:
        return value
    return url2pathname(parts.path) if parts.scheme == "file" else None


def _stamp(path: Path) -> str:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"
