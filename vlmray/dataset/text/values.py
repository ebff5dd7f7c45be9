"""Values as the texts that people write for them, and Arrow's rows without loss.

A question or an answer is a text whatever the type of its column. Texts that are not UTF-8 keep their bytes
as lone surrogates, so that one bad byte fails one row, where `check_text` finds it.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_ERRORS = "surrogateescape"


def as_text(value: object) -> str | None:
    """Write a value as a person would; None where there is none.

    >>> [as_text(value) for value in (4.0, 0.5, 1e20, True, datetime.date(2020, 1, 1), float("nan"))]
    ['4', '0.5', '1e+20', 'true', '2020-01-01', None]

    Raises:
        ValueError: it is a list or a structure.
    """
    if isinstance(value, list | tuple | Mapping):
        raise ValueError(f"expected a text, got {name_kind(value)}")
    if value is None or value != value:  # NaN
        return None
    write = next((write for kinds, write in _WRITERS if isinstance(value, kinds)), str)
    return write(value)


_WRITERS: tuple[tuple[Any, Callable[[Any], str]], ...] = (
    (str, str),
    ((bool, np.bool_), lambda value: "true" if value else "false"),
    ((float, np.floating), lambda value: str(value).removesuffix(".0")),
    (decimal.Decimal, lambda value: format(value, "f")),
    (datetime.datetime, lambda value: value.isoformat(" ")),
    (bytes, lambda value: decode(value)),
)
"""Of other values, integers, dates and times among them, Python's own text is the usual one."""


def name_kind(value: object) -> str:
    """Say what a value is that is no text, for a message."""
    if isinstance(value, Mapping):
        return f"a structure of {', '.join(map(str, value))}" if value else "an empty structure"
    if isinstance(value, list | tuple):
        inner = next((item for item in value if item is not None), None)
        return "a list" if inner is None or isinstance(inner, str) else f"a list of {name_kind(inner)}"
    return "a text" if isinstance(value, str) else type(value).__name__


def decode(data: bytes) -> str:
    """Decode UTF-8; bytes that are none become lone surrogates, which `check_text` finds."""
    return data.decode("utf-8", _ERRORS)


def check_text(text: str) -> str:
    """Return a text that can be written as UTF-8.

    Raises:
        ValueError: it holds bytes that are not UTF-8, or half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"lone surrogate \\u{code:04x}"
        around = printable(text[max(0, error.start - 20) : error.start + 20])
        raise ValueError(f"text that is not UTF-8 ({found} in {around!r}); convert the file") from error
    return text


def printable(value: object) -> str:
    """Show a value where nothing may fail any more."""
    return str("" if value is None else value).encode("utf-8", "replace").decode()


class Written(str):
    """A number of JSON, as it is written."""

    __slots__ = ()


def parse_json(text: str) -> Any:
    """Read JSON with its numbers as they are written; NaN is no value."""
    return json.loads(text, parse_float=Written, parse_int=Written, parse_constant=_constant)


def with_numbers(value: Any) -> Any:
    """Return what JSON holds, with its numbers as numbers."""
    if isinstance(value, Written):
        return json.loads(value)
    if isinstance(value, list):
        return [with_numbers(item) for item in value]
    return {name: with_numbers(item) for name, item in value.items()} if isinstance(value, dict) else value


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


# Arrow


def to_rows(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a table as Python values: single precision as short as it was written, JSON read."""
    columns = [_to_values(column) for column in table.columns]
    return [dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def count_filled(column: pa.ChunkedArray) -> int:
    """Count the values of a column that hold something: neither null, nor empty lists or structures."""
    kind = column.type
    if pa.types.is_struct(kind):
        fields = (pc.is_valid(pc.struct_field(column, [field.name])) for field in kind)
        filled = functools.reduce(pc.or_, fields)
    elif _is_list(kind):
        filled = pc.greater(pc.list_value_length(column), 0)
    else:
        filled = pc.is_valid(column)
    return int(pc.sum(filled).as_py() or 0)


def _to_values(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(_as_binary(kind)).to_pylist()
        return [_convert(value, kind) for value in values]
    return values if _is_plain(kind) else [_convert(value, kind) for value in values]


@functools.cache
def _is_plain(kind: pa.DataType) -> bool:
    inner = [kind.field(at).type for at in range(kind.num_fields)]
    return not _is_single(kind) and not isinstance(kind, pa.JsonType) and all(map(_is_plain, inner))


def _convert(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if _is_list(kind):
        return [_convert(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _convert(value[field.name], field.type) for field in kind}
    if _is_single(kind):
        return float(str(kind.to_pandas_dtype()(value)))  # the shortest that says this number
    if isinstance(value, bytes) and _is_text(kind):
        value = decode(value)
    return parse_json(value) if isinstance(kind, pa.JsonType) else value


def _as_binary(kind: pa.DataType) -> pa.DataType:
    """Return the type with the bytes of its texts in their place."""
    if _is_text(kind):
        return pa.large_binary()
    if _is_list(kind):
        return pa.large_list(_as_binary(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_binary(field.type)) for field in kind])
    return kind


def _is_text(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _is_list(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _is_single(kind: pa.DataType) -> bool:
    return any(test(kind) for test in (pa.types.is_float16, pa.types.is_float32))
