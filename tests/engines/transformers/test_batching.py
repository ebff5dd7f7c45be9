"""Rows become batches: all of them, no batch too large, those that begin alike side by side."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from itertools import groupby, pairwise

import pytest

from vlmray.engines.transformers.batching import Batcher
from vlmray.engines.transformers.in_flight import InFlight
from vlmray.models.adapters import Adapter
from vlmray.schema import GenerationRequest

HEAD_TOKENS = 50


def make_rows(count: Callable[[int], int], num_rows: int = 40, *, share: int = 1) -> list[InFlight]:
    """Make rows of so many tokens each, by their number; `share` of them in turn begin alike."""
    rows = []
    for index in range(num_rows):
        row = InFlight(index, GenerationRequest(request_id=str(index), messages=[]))
        row.num_tail_tokens = count(index)
        row.num_tokens = row.num_tail_tokens + HEAD_TOKENS
        row.head = (None, index // share) if share > 1 else None
        rows.append(row)
    random.Random(0).shuffle(rows)
    return rows


def cut(batcher: Batcher, rows: list[InFlight]) -> list[list[InFlight]]:
    batcher.sort(rows)
    queue, batches = deque(rows), []
    while queue:
        batches.append(batcher.take(queue))
    return batches


@pytest.mark.parametrize("share", [1, 4])
@pytest.mark.parametrize("max_batch_tokens", [1, 120, 700, 10**6])
def test_every_row_comes_once_and_no_batch_is_too_large(max_batch_tokens: int, share: int) -> None:
    batcher = Batcher(7, max_batch_tokens, copied_share=0.1)
    batches = cut(batcher, make_rows(lambda index: 1 + index * 13 % 90, share=share))
    assert sorted(row.index for batch in batches for row in batch) == list(range(40))
    for batch, following in pairwise(batches):
        tokens = batcher.count_tokens(batch)
        assert len(batch) <= 7
        assert tokens <= max_batch_tokens or len(batch) == 1
        assert len(batch) == 7 or batcher.count_tokens([*batch, following[0]]) > max_batch_tokens


def test_the_longest_come_first_and_those_that_begin_alike_together() -> None:
    batcher = Batcher(16, 10**6)
    alone = make_rows(lambda index: 1 + index * 13 % 90)
    batcher.sort(alone)
    assert [row.num_tokens for row in alone] == sorted((row.num_tokens for row in alone), reverse=True)
    shared = make_rows(lambda index: 1 + index * 13 % 90, share=4)
    batcher.sort(shared)
    runs = [list(run) for _, run in groupby(shared, key=lambda row: row.head)]
    assert [len(run) for run in runs] == [4] * 10
    longest = [max(row.num_tokens for row in run) for run in runs]
    assert longest == sorted(longest, reverse=True)


def test_a_shared_beginning_counts_once_and_its_copies_by_what_they_take() -> None:
    rows = make_rows(lambda index: 10, num_rows=4, share=4)
    whole = HEAD_TOKENS + 10
    assert Batcher(4, 1, copied_share=0.0).count_tokens(rows) == whole + 3 * 10
    assert Batcher(4, 1, copied_share=0.5).count_tokens(rows) == whole + 3 * (10 + whole // 2)
    rows[0].head = None
    assert Batcher(4, 1, copied_share=0.0).count_tokens(rows) == 4 * whole


def test_after_a_failure_batches_are_half_as_large_and_never_grow() -> None:
    batcher = Batcher(16, 10**6)
    rows = make_rows(lambda index: 10)
    batcher.remember_failure(rows[:8])
    assert batcher.max_batch_tokens == 4 * (HEAD_TOKENS + 10)
    batcher.remember_failure(rows)
    assert {len(batch) for batch in cut(batcher, rows)} == {4}


def test_adapters_that_may_not_mix_come_one_after_the_other() -> None:
    batcher, rows = Batcher(16, 10**6), make_rows(lambda index: 1 + index)
    plain, one, two = (Adapter({}, mixes=mixes) for mixes in (True, False, False))
    for row in rows:
        row.adapter = [None, one, plain, two][row.index % 4]
    batcher.sort(rows)
    groups = [[row.adapter for row in group] for _, group in groupby(rows, key=lambda row: row.group)]
    assert list(map(set, groups)) == [{None, plain}, {one}, {two}]
