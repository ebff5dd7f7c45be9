"""Who is at work on what, so that a row that kills replicas is told apart from a machine that leaves.

    claim -> release                        a chunk, as long as all goes well
    claim, and its last holder is gone      replicas died over it: its rows are answered one by one
      claim_row -> keep                     for each of them, so that the next death names the row
    claim after release                     its answers were lost, or the word that they are written

A holder that is gone died of what it held, unless its machine is gone as well. No Ray here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from vlmray.schema import Row

MAX_DEATHS = 3
"""A row over which as many replicas died is not asked again."""


class Holder(NamedTuple):
    """A process that holds a model."""

    process: str
    """Another one after each start, so that an actor that was started again is somebody else."""

    node: str


class Claim(NamedTuple):
    """What is known of a chunk that was claimed."""

    num_deaths: int
    """How often a holder died over it."""

    answers: dict[str, Row]
    """What was answered before that, by sample id."""

    was_answered: bool
    """Whether somebody was done with it already."""


@dataclass(slots=True)
class _Work:
    holder: Holder | None = None
    nodes: list[str] = field(default_factory=list)
    """Where holders died."""

    def change_hands(self, holder: Holder) -> None:
        if self.holder is not None and self.holder != holder:
            self.nodes.append(self.holder.node)
        self.holder = holder


@dataclass(slots=True)
class _Chunk(_Work):
    rows: defaultdict[str, _Work] = field(default_factory=lambda: defaultdict(_Work))
    answers: dict[str, Row] = field(default_factory=dict)


class Claims:
    """What the replicas of a run are at work on.

    Args:
        is_alive: Tells whether a node is there. It is asked whenever deaths are counted, not when they are
            noticed: a machine that shuts down may end its replica before anybody knows.
    """

    def __init__(self, is_alive: Callable[[str], bool]) -> None:
        self._is_alive = is_alive
        self._chunks: defaultdict[str, _Chunk] = defaultdict(_Chunk)
        self._answered: set[str] = set()

    def claim(self, chunk: str, holder: Holder) -> Claim:
        """Begin to work on a chunk; where the claim of another process is open, that one died over it."""
        work = self._chunks[chunk]
        work.change_hands(holder)
        return Claim(self._count(work), work.answers, chunk in self._answered)

    def pause(self, chunk: str) -> None:
        """Go on holding a chunk, without doing anything with it that may kill."""
        self._chunks[chunk].holder = None

    def claim_row(self, chunk: str, sample_id: str, holder: Holder) -> int:
        """Begin to work on one row alone, and return how many died over it, alone and with its chunk."""
        row = self._chunks[chunk].rows[sample_id]
        row.change_hands(holder)
        return self._count(row) + self._count(self._chunks[chunk])

    def keep(self, chunk: str, row: Row) -> None:
        """Be done with one row."""
        self._chunks[chunk].answers[row["sample_id"]] = row
        self._chunks[chunk].rows[row["sample_id"]].holder = None

    def release(self, chunk: str) -> None:
        """Be done with a chunk, and forget all but that."""
        self._chunks.pop(chunk, None)
        self._answered.add(chunk)

    def _count(self, work: _Work) -> int:
        return sum(map(self._is_alive, work.nodes))
