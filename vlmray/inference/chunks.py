"""What travels between the stages of the pipeline: rows together, and what is left of them at the end.

A chunk is one value of one Arrow row, so Ray neither merges chunks nor splits them, and none of its rows is
taken apart into columns on the way.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa

from vlmray.inference.timeline import MODEL_STAGES, Span
from vlmray.schema import Row


class Chunk(NamedTuple):
    """Rows that go through the stages together."""

    rows: list[Row]
    spans: list[Span]
    """When they were in the stages so far."""


class CacheUse(NamedTuple):
    """What prefix caches had, of the prompts whose engine says so."""

    num_tokens: int = 0
    num_cached: int = 0

    @classmethod
    def of(cls, rows: Iterable[Row]) -> CacheUse:
        """Sum up rows that were answered."""
        known = [row for row in rows if row.get("num_cached_tokens") is not None]
        return cls(
            sum(row["num_prompt_tokens"] or 0 for row in known),
            sum(row["num_cached_tokens"] or 0 for row in known),
        )

    def plus(self, other: CacheUse) -> CacheUse:
        """Return both together."""
        return CacheUse(self.num_tokens + other.num_tokens, self.num_cached + other.num_cached)

    @property
    def share(self) -> float | None:
        """Share of the tokens that was cached; None where nothing is known."""
        return self.num_cached / self.num_tokens if self.num_tokens else None


class Reuse(NamedTuple):
    """Answers that were taken over, so that nobody was asked."""

    num_identical: int = 0
    """From rows of the run that ask the same."""

    num_from_cache: int = 0
    """From earlier runs."""

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Reuse:
        """Count them among rows that were answered."""
        sources = [row.get("taken_from") for row in rows if row["error"] is None]
        return cls(sources.count("run"), sources.count("cache"))

    def plus(self, other: Reuse) -> Reuse:
        """Return both together."""
        return Reuse(self.num_identical + other.num_identical, self.num_from_cache + other.num_from_cache)


class Finished(NamedTuple):
    """What the driver is told of a chunk that is written."""

    num_rows: int
    num_failed: int
    spans: list[Span]
    cache: CacheUse = CacheUse()
    reuse: Reuse = Reuse()

    def plus(self, other: Finished) -> Finished:
        """Return both together, without their spans."""
        num_rows, num_failed = self.num_rows + other.num_rows, self.num_failed + other.num_failed
        return Finished(num_rows, num_failed, [], self.cache.plus(other.cache), self.reuse.plus(other.reuse))

    @property
    def begun_s(self) -> float:
        """When the model began to load for it, or to answer."""
        begins = [span.started_s for span in self.spans if span.stage in MODEL_STAGES]
        return min(begins, default=time.time())


def pack(chunk: Chunk | Finished) -> pa.Table:
    """Make a block of one row of a chunk."""
    return pa.table({"chunk": pa.array([pickle.dumps(chunk, pickle.HIGHEST_PROTOCOL)], pa.large_binary())})


def unpack(block: pa.Table) -> Any:
    """Return the chunk of a block."""
    return pickle.loads(block["chunk"][0].as_buffer())
