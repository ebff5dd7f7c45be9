"""Texts that are read while they grow, and rows that end before their time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.engines import (
    check_that_leavers_leave,
    copy_no_rows,
    make_mixed_requests,
    make_request,
    texts,
)
from helpers.gateways import Backend, serving
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.engines.fake import FakeEngine


def test_streamed_pieces_are_the_text_and_come_while_others_go_on(make_engine: Any) -> None:
    requests = [make_request(n, n % 3, max_new_tokens=4 + 3 * n) for n in range(6)]
    engine = make_engine(batch_size=4)
    expected = engine.generate(requests)
    pieces: list[tuple[int, str]] = []
    assert engine.generate(requests, on_text=lambda index, text: pieces.append((index, text))) == expected
    for index, completion in enumerate(expected):
        assert "".join(text for place, text in pieces if place == index) == completion.text
    first_batch = [place for place, _ in pieces[:8]]
    assert len(set(first_batch)) > 1  # rows of a batch take turns
    assert all(text for _, text in pieces)


def test_a_batch_that_is_tried_again_streams_nothing_twice(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [make_request(n, 1) for n in range(4)]
    engine = make_engine(batch_size=4)
    expected = texts(engine.generate(requests))
    generate = engine.model.generate

    def fail_after_streaming(**inputs: Any) -> Any:
        output = generate(**inputs)
        if len(inputs["input_ids"]) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return output

    monkeypatch.setattr(engine.model, "generate", fail_after_streaming)
    found = dict.fromkeys(range(4), "")

    def collect(index: int, text: str) -> None:
        found[index] += text

    assert texts(engine.generate(requests, on_text=collect)) == list(found.values()) == expected


EIGHT_WORDS = "one+two+three+four+five+six+seven+eight"


@pytest.fixture(params=["transformers", "transformers, rows unshared", "LLaVA", "fake", "openai"])
def any_engine(
    request: pytest.FixtureRequest, make_engine: Any, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """Every engine, and every way that one of them takes."""
    if request.param == "fake":
        yield build_engine(engine="fake", model_id=f"fake?answer={EIGHT_WORDS}")
    elif request.param == "openai":
        backend = Backend()
        backend.engine = FakeEngine(answer=EIGHT_WORDS.replace("+", " "))
        with serving(backend, key=None) as (url, _):
            engine = build_engine(engine="openai", model_id="fake", endpoint=url)
            yield engine
            engine.close()
    elif request.param == "LLaVA":
        engine = build_engine(engine="transformers", model_id=str(tiny_llava), batch_size=4)
        yield engine
        engine.close()
    else:
        engine = make_engine(batch_size=4)
        if request.param != "transformers":
            copy_no_rows(engine, monkeypatch)
        yield engine


def test_a_row_that_nobody_wants_ends_and_no_other_row_notices(any_engine: Engine) -> None:
    check_that_leavers_leave(any_engine)


def test_the_model_stops_within_a_token_once_everybody_has_left(model: Any, make_engine: Any) -> None:
    engine, num_tokens = make_engine(batch_size=2), 0
    left = False
    language_model = model.model.language_model

    def count(*_: Any) -> None:
        nonlocal num_tokens, left
        num_tokens += 1
        left = left or num_tokens == 3

    hook = language_model.register_forward_hook(count)
    try:
        found = engine.generate(make_mixed_requests(6, max_new_tokens=200), cancelled=lambda index: left)
    finally:
        hook.remove()
    assert num_tokens == 3  # forward passes: none for what the others, who had not begun, asked
    assert [completion.finish_reason for completion in found] == ["cancelled"] * 6
    assert sorted(completion.num_completion_tokens for completion in found) == [0, 0, 0, 0, 2, 2]


def test_an_answer_ends_before_a_stop_text(make_engine: Any) -> None:
    engine = make_engine()
    requests = [make_request(n, 1, max_new_tokens=24) for n in range(4)]
    whole = engine.generate(requests)
    words = whole[0].text.split(" ")
    stop = (" ".join(words[2:4]), "never said")
    stopping = dataclasses.replace(requests[0], stop=stop)
    pieces: list[str] = []
    completions = engine.generate(
        [stopping, *requests[1:]], on_text=lambda index, text: pieces.append(text) if index == 0 else None
    )
    assert completions[1:] == whole[1:]
    assert completions[0].text == "".join(pieces) == whole[0].text.partition(stop[0])[0]
    assert completions[0].finish_reason == "stop"
    assert 0 < completions[0].num_completion_tokens < whole[0].num_completion_tokens
    assert engine.generate([stopping])[0] == completions[0]
