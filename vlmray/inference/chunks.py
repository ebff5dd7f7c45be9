"""What travels between the stages of the pipeline: rows together, and what is left of them at the end.

A chunk is one value of one Arrow row, so Ray neither merges chunks nor splits them, and none of its rows is
taken apart into columns on the way.
"""

from __future__ import annotations

import pickle
from typing import Any, NamedTuple

import pyarrow as pa

from vlmray.inference.timeline import Span
from vlmray.schema import Row


class Chunk(NamedTuple):
    """Rows that go through the stages together."""

    rows: list[Row]
    spans: list[Span]
    """When they were in the stages so far."""


class Finished(NamedTuple):
    """What the driver is told of a chunk that is written."""

    num_rows: int
    num_failed: int
    spans: list[Span]


def pack(chunk: Chunk | Finished) -> pa.Table:
    """Make a block of one row of a chunk."""
    return pa.table({"chunk": pa.array([pickle.dumps(chunk, pickle.HIGHEST_PROTOCOL)], pa.large_binary())})


def unpack(block: pa.Table) -> Any:
    """Return the chunk of a block."""
    return pickle.loads(block["chunk"][0].as_buffer())
