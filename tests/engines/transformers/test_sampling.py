"""Choosing tokens row by row: the right distribution, and padding that does not count."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from vlmray.engines.transformers.sampling import (
    RowwiseLogitsProcessor,
    RowwiseStoppingCriteria,
    keep_nucleus,
    sample_scores,
)
from vlmray.schema import GenerationRequest

NUMBERS = torch.ones(3, dtype=torch.bool)


def test_sampling_draws_from_the_softmax_of_the_nucleus() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -8.0])
    temperature, top_p, draws = 0.7, 0.97, 4000
    request = GenerationRequest(request_id="a", messages=[], temperature=temperature, top_p=top_p)
    counts = Counter(int(sample_scores(logits, request, step).argmax()) for step in range(draws))
    probabilities = (logits / temperature).softmax(-1)
    kept = probabilities * (probabilities.cumsum(-1) - probabilities < top_p)
    expected = (kept / kept.sum() * draws).tolist()
    assert sum(value > 0 for value in expected) == 4  # the last two are outside the nucleus
    assert counts.keys() <= {0, 1, 2, 3}
    chi_square = sum((counts[k] - expected[k]) ** 2 / expected[k] for k in range(4))
    assert chi_square < 16.3  # 3 degrees of freedom, one false alarm in a thousand


def test_nucleus_always_keeps_the_likeliest_token() -> None:
    scores = keep_nucleus(torch.tensor([0.0, 5.0, 1.0]), top_p=1e-9)
    assert scores.isfinite().tolist() == [False, True, False]


def test_penalty_of_a_padded_row_equals_that_of_the_row_alone() -> None:
    torch.manual_seed(0)
    pad, row, penalty = 7, torch.tensor([[1, 2, 2, 11]]), 1.3  # 11 is outside the vocabulary of 10
    padded = torch.cat([torch.full((1, 3), pad), row], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    ours = RowwiseLogitsProcessor([GenerationRequest(request_id="a", messages=[])], mask, penalty)
    reference = RepetitionPenaltyLogitsProcessor(penalty)
    for token in (5, 7, 1):
        scores = torch.randn(1, 10)
        expected = reference(row, scores.clone())
        assert torch.equal(ours(padded, scores), expected)
        new = torch.tensor([[token]])
        row, padded = torch.cat([row, new], dim=1), torch.cat([padded, new], dim=1)


def request(**options: Any) -> GenerationRequest:
    return GenerationRequest(request_id="a", messages=[], **options)


def kept(logits: torch.Tensor, **options: Any) -> list[int]:
    """The tokens that a row may get."""
    return sample_scores(logits, request(temperature=1.0, **options), 0).isfinite().nonzero()[:, 0].tolist()


def test_top_k_and_min_p_keep_the_likeliest() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    assert kept(logits) == [0, 1, 2, 3, 4]
    assert kept(logits, top_k=2) == [0, 1]
    assert kept(logits, top_k=99) == [0, 1, 2, 3, 4]
    assert kept(logits, min_p=0.2) == [0, 1, 2]  # e^-1.5 is 0.22, e^-2 is 0.14
    assert kept(logits, min_p=1.0) == [0]
    assert kept(logits, top_k=3, top_p=0.7) == [0, 1]  # top_p counts what top_k has left
    assert kept(logits, min_p=0.3, top_p=1e-9) == [0]


def test_penalties_count_the_answer_alone_wherever_it_begins() -> None:
    rows = [
        request(presence_penalty=0.5), request(frequency_penalty=0.25), request(),
        request(presence_penalty=-1.0, frequency_penalty=2.0),
    ]  # fmt: skip
    prompt, said = torch.tensor([[1, 2, 2]] * 4), torch.tensor([[4, 2, 4]] * 4)
    scores = torch.zeros(4, 6)
    expected = torch.zeros(4, 6)
    expected[0, [2, 4]] = -0.5
    expected[1, 2], expected[1, 4] = -0.25, -0.5
    expected[3, 2], expected[3, 4] = 1.0 - 2.0, 1.0 - 4.0
    whole = RowwiseLogitsProcessor(rows, torch.ones_like(prompt))
    for length in range(4):
        found = whole(torch.cat([prompt, said[:, :length]], dim=1), scores)
    assert torch.equal(found, expected)
    half = torch.cat([prompt, said[:, :2]], dim=1)
    gone_on = RowwiseLogitsProcessor(rows, torch.ones_like(half), num_tokens=[2] * 4)
    gone_on(half, scores)
    assert torch.equal(gone_on(torch.cat([prompt, said], dim=1), scores), expected)


def test_each_row_has_its_own_repetition_penalty() -> None:
    rows = [request(), request(repetition_penalty=2.0), request(repetition_penalty=1.0)]
    ids, scores = torch.tensor([[1, 2]] * 3), torch.tensor([[4.0, -4.0, 4.0, 4.0]] * 3)
    found = RowwiseLogitsProcessor(rows, torch.ones_like(ids), 1.5)(ids, scores)
    assert torch.allclose(found, torch.tensor([
        [4.0, -6.0, 4 / 1.5, 4.0], [4.0, -8.0, 2.0, 4.0], [4.0, -4.0, 4.0, 4.0],
    ]))  # fmt: skip


def test_greedy_rows_are_not_touched() -> None:
    rows = [
        GenerationRequest(request_id="greedy", messages=[], max_new_tokens=1),
        GenerationRequest(request_id="nearly", messages=[], max_new_tokens=2, temperature=1e-9),
        GenerationRequest(request_id="sampled", messages=[], max_new_tokens=3, temperature=1.0),
    ]
    ids, scores = torch.zeros(3, 4, dtype=torch.long), torch.arange(30.0).view(3, 10)
    changed = RowwiseLogitsProcessor(rows, torch.ones_like(ids))(ids, scores)
    assert [bool((changed[row] != scores[row]).any()) for row in range(3)] == [False, False, True]


def test_a_row_that_has_ended_is_read_no_further() -> None:
    read: list[tuple[int, int | None]] = []

    def ends(row: int, token_id: int | None) -> bool:
        read.append((row, token_id))
        return token_id == 7

    criteria = RowwiseStoppingCriteria(3, ends, num_to_end=2, is_finite=lambda: NUMBERS)
    ids, scores = torch.tensor([[1, 7], [7, 2], [7, 2]]), torch.zeros(3, 9)
    assert criteria(ids, scores).tolist() == [True, False, False]
    assert criteria(ids, scores).tolist() == [True, False, False]
    assert read == [(0, 7), (1, 2), (2, 2), (1, 2), (2, 2)]


def test_a_token_chosen_by_scores_that_are_no_numbers_is_none() -> None:
    rows = [GenerationRequest(request_id="a", messages=[], max_new_tokens=8)] * 5
    ids, scores = torch.zeros(5, 4, dtype=torch.long), torch.zeros(5, 9)
    scores[1, 3], scores[2, 3], scores[3, 3], scores[4] = math.nan, math.inf, -math.inf, -math.inf
    processor = RowwiseLogitsProcessor(rows, torch.ones_like(ids))
    read: list[int | None] = []
    criteria = RowwiseStoppingCriteria(
        5, lambda row, token_id: bool(read.append(token_id)), 5, is_finite=lambda: processor.is_finite
    )
    processor(ids, scores)
    criteria(ids, scores)
    assert read == [0, None, None, 0, None]


def test_all_stop_once_enough_rows_have_ended() -> None:
    criteria = RowwiseStoppingCriteria(
        3, lambda row, token_id: token_id == 7, num_to_end=2, is_finite=lambda: NUMBERS
    )
    scores = torch.zeros(3, 9)
    assert criteria(torch.tensor([[2], [7], [2]]), scores).tolist() == [False, True, False]
    assert criteria(torch.tensor([[7], [0], [2]]), scores).tolist() == [True, True, True]


def test_a_draw_depends_on_how_much_of_the_answer_the_prompt_holds() -> None:
    rows = [GenerationRequest(request_id="a", messages=[], max_new_tokens=8, temperature=1.0, seed=3)]
    scores = torch.randn(1, 50)
    ids = torch.ones(1, 4, dtype=torch.long)
    whole = RowwiseLogitsProcessor(rows, torch.ones_like(ids))
    whole(ids, scores)
    second = whole(torch.ones(1, 5, dtype=torch.long), scores)
    gone_on = RowwiseLogitsProcessor(rows, torch.ones(1, 5), num_tokens=[1])
    assert torch.equal(gone_on(torch.ones(1, 5, dtype=torch.long), scores), second)
