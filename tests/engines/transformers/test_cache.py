"""The cache with room holds what transformers' own holds, whatever is done to both."""

from __future__ import annotations

import random

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache

from vlmray.engines.transformers.cache import make_cache


@pytest.mark.parametrize("room", [0, 1, 5, 64])
def test_it_holds_what_a_cache_without_room_holds(room: int) -> None:
    ours, theirs = make_cache(room), DynamicCache()
    rng = random.Random(room)
    num_rows = 3
    for step in range(40):
        if step % 7 == 3:
            kept = torch.tensor(rng.choices(range(num_rows), k=rng.randint(1, 4)))
            num_rows = len(kept)
            for cache in (ours, theirs):
                cache.batch_select_indices(kept)
        num_new = rng.choice([1, 1, 1, 9])
        for layer in range(2):
            keys, values = torch.randn(2, num_rows, 2, num_new, 4)
            got, expected = (cache.update(keys, values, layer) for cache in (ours, theirs))
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_tokens_within_the_room_move_nothing() -> None:
    cache = make_cache(8)
    append(cache, 5)
    cache.batch_select_indices(torch.tensor([0, 0, 1]))
    places = {append(cache, 1, num_rows=3).data_ptr() for _ in range(8)}
    assert len(places) == 1
    assert append(cache, 1, num_rows=3).data_ptr() not in places


def append(cache: Cache, num_tokens: int, num_rows: int = 2) -> torch.Tensor:
    keys, _ = cache.update(*torch.randn(2, num_rows, 2, num_tokens, 4), 0)
    return keys
