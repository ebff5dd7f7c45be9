"""Text files as rows: where each row lies in its file, found once; a row is parsed when it is read.

    scan -> TextFile: path, columns, first and last byte of each row -> TextFile.read

Nothing is converted and nothing kept but offsets, so a file may be larger than memory, a row is what the file
says, and rows need not be alike. Both formats are cut as Latin-1, where a character is a byte, which is right
for any UTF-8; bytes that are not UTF-8 matter only to the row they are in.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from vlmray.dataset.text.values import decode, name_kind, parse_json

_BYTES_PER_READ = 1 << 20
_JSON_SPACE = " \t\r\n"

Span = tuple[int, int, dict[str, Any]]
"""First byte of a row, the one after its last, and what it holds, by column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """A file of rows, by where they lie in it."""

    path: Path
    stamp: tuple[int, int]
    """Size and time of change when its rows were found."""

    separator: str | None
    """Of cells; None: the rows are JSON objects."""

    columns: tuple[str, ...]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    filled: Counter[str]
    """Rows that have a value, by column."""

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield rows by index, with the columns that each of them has.

        Raises:
            ValueError: the file is another one now.
        """
        with self.path.open("rb") as file:
            if _stamp(file) != self.stamp:
                raise ValueError(f"{self.path} changed while it was in use")
            for index in indices:
                file.seek(self.starts[index])
                yield self._parse(decode(file.read(self.ends[index] - self.starts[index])))

    def _parse(self, text: str) -> dict[str, Any]:
        if self.separator is None:
            return dict(parse_json(text))
        (cells,) = _cells(io.StringIO(text, newline="\n"), self.separator)  # other breaks are in the cells
        return {name: cell or None for name, cell in zip(self.columns, cells, strict=True)}


def scan(path: Path, separator: str | None) -> TextFile:
    """Find the rows of a file.

    Args:
        path: The file.
        separator: What stands between cells; None for JSON.

    Raises:
        ValueError: it is not what its name says; the message names file and line.
    """
    starts, ends, filled = array("q"), array("q"), Counter[str]()
    columns: dict[str, None] = {}
    with path.open("rb") as file:
        begin = _skip_mark(file, path)
        if separator is None:
            rows = _json_rows(file, begin, path)
        else:
            header, rows = _delimited_rows(file, begin, path, separator)
            columns.update(dict.fromkeys(header))
        for start, end, row in rows:
            starts.append(start)
            ends.append(end)
            columns.update(dict.fromkeys(row))
            filled.update([name for name, value in row.items() if value not in (None, "", [])])
        stamp = _stamp(file)
    return TextFile(
        path=path, stamp=stamp, separator=separator, columns=tuple(columns), filled=filled,
        starts=np.frombuffer(starts, np.int64), ends=np.frombuffer(ends, np.int64),
    )  # fmt: skip


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _skip_mark(file: BinaryIO, path: Path) -> int:
    """Pass over a byte order mark; return where the text begins."""
    beginning = file.read(1024)
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in beginning:
        raise _mistake(path, 1, "NUL, so not UTF-8 text; UTF-16 becomes that by: iconv -f UTF-16 -t UTF-8")
    begin = len(codecs.BOM_UTF8) if beginning.startswith(codecs.BOM_UTF8) else 0
    file.seek(begin)
    return begin


def _mistake(path: Path, line: int, problem: object) -> ValueError:
    return ValueError(f"{path.name}, line {line}: {problem}")


# Cells between separators


def _cells(lines: Iterable[str], separator: str) -> Any:
    csv.field_size_limit(2**31 - 1)  # an image in base64 is one cell
    return csv.reader(lines, delimiter=separator, strict=True)


def _delimited_rows(
    file: BinaryIO, begin: int, path: Path, separator: str
) -> tuple[list[str], Iterator[Span]]:
    offset = begin

    def lines() -> Iterator[str]:
        nonlocal offset
        for line in file:
            offset += len(line)
            yield line.decode("latin-1")

    reader = _cells(lines(), separator)
    records = _records(reader, path, lambda: offset)
    header = next((_header(cells, path) for _, _, _, cells in records), None)
    if header is None:
        raise ValueError(f"{path.name} is empty")
    return header, _rows_under(header, records, path)


def _records(reader: Any, path: Path, offset: Callable[[], int]) -> Iterator[tuple[int, int, int, list[str]]]:
    """Yield first and last byte, first line and cells of each record."""
    while True:
        start, line = offset(), reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            is_break = "new-line" in str(error)
            problem = (
                "a lone carriage return" if is_break else f"{error}: a quote that is not closed or doubled"
            )
            raise _mistake(path, line, problem) from error
        if cells is None:
            return
        if cells:  # otherwise the line is empty
            yield start, offset(), line, cells


def _header(cells: Sequence[str], path: Path) -> list[str]:
    names = [decode(cell.encode("latin-1")) or f"Unnamed: {at}" for at, cell in enumerate(cells)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise _mistake(path, 1, f"two columns are called {twice[0]!r}")
    return names


def _rows_under(header: Sequence[str], records: Iterable[Any], path: Path) -> Iterator[Span]:
    for start, end, line, cells in records:
        if len(cells) != len(header):
            raise _mistake(path, line, f"{len(cells)} cells under a header of {len(header)}")
        yield start, end, dict(zip(header, cells, strict=True))


# JSON: one object a line, or objects anyhow, also in one list


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has two values for {twice!r}")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=str, parse_float=str)


def _json_rows(file: BinaryIO, begin: int, path: Path) -> Iterator[Span]:
    first = next((line for line in file if line.strip()), b"")
    file.seek(begin)
    return _lines(file, begin, path) if _is_object(first) else _objects(file, begin, path)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(_DECODER.decode(decode(line).strip(_JSON_SPACE)), dict)
    except (ValueError, RecursionError) as error:
        return not isinstance(error, json.JSONDecodeError)


def _lines(file: BinaryIO, begin: int, path: Path) -> Iterator[Span]:
    end = begin
    for number, line in enumerate(file, 1):
        start, end = end, end + len(line)
        text = decode(line).strip(_JSON_SPACE)
        if text:
            try:
                yield start, end, _as_row(_DECODER.decode(text))
            except (ValueError, RecursionError) as error:
                raise _mistake(path, number, getattr(error, "msg", error)) from error


def _as_row(value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError(f"{name_kind(value)} where an object was expected")


def _objects(file: BinaryIO, begin: int, path: Path) -> Iterator[Span]:
    """Cut objects that no lines cut, in a list or not; `text` is a part of the file, from byte `base` on."""
    text, base, at, line, in_list = "", begin, 0, 1, False
    while True:
        before, at = at, _next(text, at, in_list)
        try:
            if not in_list and base == begin and before == 0 and text[at : at + 1] == "[":
                in_list, at = True, at + 1
                continue
            if in_list and text[at : at + 1] == "]":
                break
            value, end = _DECODER.raw_decode(text, at)
            row = _as_row(value)
        except (ValueError, RecursionError) as error:
            if more := file.read(max(_BYTES_PER_READ, len(text))):
                line += text.count("\n", 0, before)
                text, base, at = text[before:] + more.decode("latin-1"), base + before, 0
                continue
            if at == len(text) and not in_list:
                return
            where = line + text.count("\n", 0, getattr(error, "pos", at))
            raise _mistake(path, where, getattr(error, "msg", error)) from error
        yield base + at, base + end, row if all(map(str.isascii, row)) else _read_latin(text[at:end])
        at = end
    if (text[at + 1 :] + file.read().decode("latin-1")).strip(_JSON_SPACE):
        raise _mistake(path, line + text.count("\n", 0, at), "something follows the list")


def _next(text: str, at: int, in_list: bool) -> int:
    """Return where the next value begins, or the list ends."""
    skipped = _JSON_SPACE + "," * in_list
    while at < len(text) and text[at] in skipped:
        at += 1
    return at


def _read_latin(text: str) -> dict[str, Any]:
    return dict(parse_json(decode(text.encode("latin-1"))))
