"""Slices of a split, and the ids of its rows."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pyarrow as pa
import pytest

from vlmray.dataset.slices import mask_rows, pack_rows, parse_sample_slices, row_indices, sample_id


def _random_slice(rng: random.Random, num_rows: int) -> tuple[str, slice]:
    bounds = [rng.choice([None, rng.randint(-2 * num_rows, 2 * num_rows)]) for _ in range(2)]
    step = rng.choice([None, rng.choice([-7, -3, -2, -1, 1, 2, 3, 7])])
    texts = ["" if bound is None else str(bound) for bound in bounds]
    tail = rng.choice(["", ":"]) if step is None else f":{step}"
    return ":".join(texts) + tail, slice(*bounds, step)


def test_slices_are_pythons_own() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        num_rows = rng.randint(1, 30)
        text, expected = _random_slice(rng, num_rows)
        rows = list(range(num_rows))[expected]
        for spelling in (text, f"[{text}]", f" [ {text.replace(':', ' : ')} ] "):
            if rows:
                assert list(parse_sample_slices(spelling, num_rows)) == rows, spelling
            else:
                with pytest.raises(ValueError, match=f"selects nothing; the split has {num_rows} rows"):
                    parse_sample_slices(spelling, num_rows)


def test_several_slices_keep_their_order_and_each_row_once() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        num_rows = rng.randint(1, 20)
        parts = [_random_slice(rng, num_rows) for _ in range(rng.randint(1, 4))]
        rows = [row for _, part in parts for row in range(num_rows)[part]]
        if rows:
            text = ",".join(rng.choice(["{}", "[{}]", " {} "]).format(part) for part, _ in parts)
            assert list(parse_sample_slices(text, num_rows)) == list(dict.fromkeys(rows)), text


@pytest.mark.parametrize("index", range(-10, 10))
def test_single_indices(index: int) -> None:
    expected = [list(range(10))[index]]
    assert list(parse_sample_slices(str(index), 10)) == expected
    assert list(parse_sample_slices(f"[{index}]", 10)) == expected


@pytest.mark.parametrize("index", ["10", "-11", "999999999999999999"])
def test_an_index_out_of_range(index: str) -> None:
    with pytest.raises(ValueError, match=f"no row {index}; the split has 10 rows"):
        parse_sample_slices(f"[:2],{index}", 10)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ",", "[]", "[ ]", "[:],", ",[:]", "[:],,[:]", "all", "a:b", "1.5", "1e3", "+1", "--1", "-",
        "-:", ":-", "1:2:3:4", "::0", "::-0", "1::00", "[0:3", "0:3]", "[[0:3]]", "(0:3)", "[0:3][5]",
        "[0:3] [5]", "1 0", "0:1 0", "- 1", "[1,2]", "0-3", "0..3", "slice(3)", "٣", "1" * 5000,
        ":" + "9" * 19, "0:3;5",
    ],
)  # fmt: skip
def test_malformed_slices(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of Python slices; examples: '\\[0:100\\]'"):
        parse_sample_slices(text, 10)


def test_no_rows_at_all() -> None:
    with pytest.raises(ValueError, match="selects nothing; the split has 0 rows"):
        parse_sample_slices("[:]", 0)


@pytest.mark.parametrize(
    ("text", "num_selected", "num_bytes"),
    [
        ("[:]", 1_000_000, 100),
        ("[::-3]", 333_334, 100),
        ("[:500],[500:1000]", 1000, 100),
        ("[:10],[20:1000000]", 999_990, 8_000_200),
    ],
)
def test_a_large_split_is_fast_and_takes_little(text: str, num_selected: int, num_bytes: int) -> None:
    rows = parse_sample_slices(text, 1_000_000)
    assert len(rows) == num_selected
    assert type(rows[-1]) is int
    assert len(pickle.dumps(rows)) < num_bytes
    assert len(pickle.dumps(rows[100:200])) < 1200
    assert list(pickle.loads(pickle.dumps(rows[100:200]))) == list(rows)[100:200]


def test_rows_are_packed_as_they_are() -> None:
    rng = random.Random(2)
    for _ in range(300):
        rows = rng.sample(range(50), rng.randint(0, 50))
        if rng.random() < 0.5:
            rows = list(range(rng.randrange(50), rng.randrange(50), rng.choice([-7, -1, 1, 3])))
        packed = pack_rows(np.array(rows, np.int64))
        assert list(packed) == rows
        assert np.flatnonzero(mask_rows(packed, 50)).tolist() == sorted(rows)


def test_ids_name_their_rows() -> None:
    rows = [0, 7, 999_999, 1_000_000, 123_456_789]
    for split in ("test", "validation_2-000007", "été"):
        names = pa.array([sample_id(split, row) for row in rows])
        assert row_indices(names).tolist() == row_indices(pa.chunked_array([names])).tolist() == rows
    others = pa.array(["test", "test-", "x-1a", None, "-3"], pa.string())
    assert row_indices(others).tolist() == [-1, -1, -1, -1, 3]
    assert len(row_indices(pa.array([], pa.string()))) == 0


def test_sample_ids_sort_like_rows_and_are_unique() -> None:
    names = [sample_id("test", index) for index in range(0, 2000, 7)]
    assert names == sorted(set(names))
    assert sample_id("test", 42) == "test-000042"
    assert sample_id("test", 1_234_567) == "test-1234567"
