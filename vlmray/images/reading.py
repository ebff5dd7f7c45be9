"""Any source of an image as encoded bytes: path, URL, data URI, Hugging Face image dict, PIL image.

    source -> read_image_bytes -> encoded bytes -> decode_image -> PIL RGB image

The two halves are separate so that encoded bytes, a hundred times smaller than tensors, can travel between
stages and be decoded on the worker that needs them. A server that takes sources from strangers passes
`public_only` (see `fetching.py`), and hands over no paths.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import stat
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from vlmray.images.decoding import (
    MAX_BYTES,
    MAX_PIXELS,
    ImageError,
    check_num_bytes,
    decode_image,
    to_upright_rgb,
)
from vlmray.images.fetching import URL_SCHEMES, FetchError, fetch_url, shorten_source

_URL_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BASE64_IMAGE = re.compile(r"\s*(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK)")  # PNG, JPEG, GIF, ...
_LEAST_BASE64 = 64


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
            URI, base64 alone, or a Hugging Face `{"bytes": ..., "path": ...}` dict. An RGB PIL image comes
            back as is.
        max_pixels: Limit on width x height, checked before decoding.
        max_bytes: Limit on the encoded size, checked while it is read.
        timeout_s: Time for the whole download, redirects included.
        base_dir: Folder that relative paths start from. Not a fence: `..` leaves it.
        public_only: Fetch URLs from public addresses alone.

    Raises:
        ImageError: The source is missing, of an unknown kind, too large, damaged, or not an image.
    """
    if isinstance(source, Image.Image):
        return to_upright_rgb(source, max_pixels)
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
    check_num_bytes(len(data), max_bytes)
    return data


# Reading: any source to bytes


def _from_dict(source: dict[str, Any]) -> object:
    """Pick the bytes, else the path, of a Hugging Face image dict."""
    for key in ("bytes", "path"):
        if source.get(key) is not None:
            return source[key]
    raise ImageError("image dict has neither bytes nor path")


def is_base64_image(text: str) -> bool:
    """Tell whether a text is an image in base64 without more, as TSV files of benchmarks hold it.

    A path of such letters without a dot is not one: nobody has images under it.
    """
    return _BASE64_IMAGE.match(text) is not None and len(text) >= _LEAST_BASE64 and "." not in text


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
    if is_base64_image(source):
        return _read_data_uri(f"data:;base64,{source}", max_bytes)
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
        check_num_bytes(status.st_size, max_bytes)
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
    check_num_bytes(len(payload) // 4, max_bytes)
    data = unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return data
    data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(f"data URI is not valid base64: {error}") from error


def _to_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    load_image_pil(image).save(buffer, "PNG")
    return buffer.getvalue()
