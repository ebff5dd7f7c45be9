"""Who is blamed for a death: never a machine that left, and of rows only those that were being answered."""

from __future__ import annotations

import pytest

from vlmray.inference.claims import Claims, Holder

NODES = {"here", "there"}


@pytest.fixture
def nodes() -> set[str]:
    return set(NODES)


@pytest.fixture
def claims(nodes: set[str]) -> Claims:
    return Claims(nodes.__contains__)


def test_who_died_over_a_chunk_is_counted(claims: Claims) -> None:
    deaths = [claims.claim("chunk", Holder(process, "here")).num_deaths for process in "abc"]
    assert deaths == [0, 1, 2]
    assert claims.claim("other", Holder("c", "here")).num_deaths == 0


def test_a_call_that_is_made_again_is_no_death(claims: Claims) -> None:
    assert [claims.claim("chunk", Holder("a", "here")).num_deaths for _ in range(3)] == [0, 0, 0]


def test_a_machine_that_left_is_nobodys_fault_however_late_it_is_missed(
    claims: Claims, nodes: set[str]
) -> None:
    claims.claim("chunk", Holder("a", "there"))
    assert claims.claim("chunk", Holder("b", "here")).num_deaths == 1
    nodes.remove("there")
    assert claims.claim("chunk", Holder("b", "here")).num_deaths == 0
    assert claims.claim("chunk", Holder("c", "here")).num_deaths == 1


def test_what_waits_kills_nobody(claims: Claims) -> None:
    claims.claim("working", Holder("a", "here"))
    claims.claim("waiting", Holder("a", "here"))
    claims.pause("waiting")
    assert claims.claim("waiting", Holder("b", "here")).num_deaths == 0
    assert claims.claim("working", Holder("b", "here")).num_deaths == 1


def test_rows_are_blamed_one_by_one_and_answers_kept(claims: Claims) -> None:
    claims.claim("chunk", Holder("a", "here"))
    claims.claim("chunk", Holder("b", "here"))
    claims.pause("chunk")
    assert claims.claim_row("chunk", "good", Holder("b", "here")) == 1
    claims.keep("chunk", {"sample_id": "good", "prediction": "yes"})
    deaths = [claims.claim_row("chunk", "bad", Holder(process, "here")) for process in "bcd"]
    assert deaths == [1, 2, 3]
    assert claims.claim_row("chunk", "other bad", Holder("d", "here")) == 1
    answers = claims.claim("chunk", Holder("d", "here")).answers
    assert answers == {"good": {"sample_id": "good", "prediction": "yes"}}


def test_of_a_chunk_that_is_done_nothing_else_is_kept(claims: Claims) -> None:
    claims.claim("chunk", Holder("a", "here"))
    claims.claim_row("chunk", "row", Holder("a", "here"))
    claims.release("chunk")
    assert claims.claim("chunk", Holder("b", "here")) == (0, {}, True)
    assert claims.claim_row("chunk", "row", Holder("b", "here")) == 0
