"""The engine's contract, as `tests/engines` holds it for the others."""

from __future__ import annotations

import dataclasses
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest

from helpers.adapters import MIXING, build_adapter
from helpers.engines import (
    check_that_leavers_leave,
    generate_alone,
    make_formed_requests,
    make_image,
    make_mixed_requests,
    make_request,
    make_shared_requests,
    text_request,
    texts,
)
from helpers.processes import marked
from vlmray.config import EngineConfig
from vlmray.engines import check_engine
from vlmray.engines.base import DeadEngineError, Engine
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.errors import OptionError
from vlmray.schema import Form, GenerationRequest, TokenLogprob


@pytest.fixture(scope="module")
def other(model: Any, processor: Any) -> Engine:
    return TransformersEngine(model, processor)


def test_greedy_text_equals_transformers_alone_in_any_order(
    engine: Engine, model: Any, processor: Any
) -> None:
    requests = make_mixed_requests()
    expected = [generate_alone(model, processor, request) for request in requests]
    assert texts(engine.generate(requests)) == expected
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    shuffled = engine.generate([requests[place] for place in order])
    assert texts(shuffled) == [expected[place] for place in order]


SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.0},
    {"min_new_tokens": 9},
    {"ignore_eos": True, "max_new_tokens": 40},
    {"stop_token_ids": tuple(range(40, 200, 3))},
    {"stop": ("a", "e")},
    {"max_new_tokens": 3},
]


def test_all_of_a_completion_is_that_of_transformers(engine: Engine, other: Engine) -> None:
    requests = [
        make_request(3 * number + kind, kind, **{"max_new_tokens": 24} | options)
        for number, options in enumerate(SETTINGS)
        for kind in range(3)
    ]
    expected = other.generate(requests)
    assert engine.generate(requests) == expected
    assert {completion.finish_reason for completion in expected} == {"stop", "length"}


def test_answers_keep_the_same_forms_as_those_of_transformers(engine: Engine, other: Engine) -> None:
    requests = make_formed_requests(max_new_tokens=60)
    expected = other.generate(requests)
    assert engine.generate(requests) == expected
    bad = make_request(0, form=Form(regex="("))
    assert engine.generate([bad]) == other.generate([bad])
    assert engine.check(bad) == other.check(bad)


def test_special_tokens_in_a_text_are_characters(engine: Engine, other: Engine) -> None:
    requests = [
        text_request("one <|image_pad|> and <|im_end|> of my own"),
        text_request("<|vision_start|><|video_pad|><|vision_end|><|endoftext|>"),
        dataclasses.replace(
            make_request(1),
            messages=[
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<|image_pad|>?"}]}
            ],
        ),
    ]
    assert engine.generate(requests) == other.generate(requests)


def test_images_as_bytes_that_many_ask_about(engine: Engine, other: Engine) -> None:
    requests = make_shared_requests()
    assert engine.generate(requests) == other.generate(requests)


def test_what_the_cache_had_of_a_prompt_is_told(engine: Engine) -> None:
    request = text_request("how many bars are there? " * 60)  # vLLM keeps whole blocks, 128 tokens on CPUs
    engine.generate([request])
    (again,) = engine.generate([request])
    assert 128 <= (again.num_cached_tokens or 0) < again.num_prompt_tokens


def test_sampled_texts_depend_on_seed_and_id_but_not_on_neighbours(engine: Engine) -> None:
    requests = make_mixed_requests(9, temperature=1.0, top_p=0.9, top_k=50, seed=3)
    alone = [texts(engine.generate([request]))[0] for request in requests]
    assert texts(engine.generate(requests[::-1])) == alone[::-1]
    greedy = texts(engine.generate(make_mixed_requests(9)))
    reseeded = texts(engine.generate([dataclasses.replace(r, seed=4) for r in requests]))
    renamed = texts(engine.generate([dataclasses.replace(r, request_id="x") for r in requests]))
    for others in (greedy, reseeded, renamed):
        assert sum(a != b for a, b in zip(alone, others, strict=True)) >= 8


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (dataclasses.replace(make_request(1), images=[]), "1 image places for 0 images"),
        (dataclasses.replace(make_request(1), images=[make_image(0, (6000, 2))]), "aspect ratio"),
        (dataclasses.replace(make_request(1), images=[b"no image"]), "image"),
        (dataclasses.replace(make_request(1), images=[cast(Any, "not an image")]), "Error"),
        (make_request(1, adapter="missing"), "unknown adapter 'missing'; known: "),
        (make_request(1, max_new_tokens=0), "max_new_tokens must be at least 1"),
        (make_request(1, temperature=float("nan")), "temperature must be at least 0"),
        (make_request(1, temperature=3.0), "temperature"),
        (text_request("word " * 100_000), "maximum context length"),
        (dataclasses.replace(make_request(1, 0), messages=[{"role": "user"}]), "content"),
    ],
)
def test_a_bad_row_is_an_error_completion_and_leaves_its_neighbours_alone(
    engine: Engine, other: Engine, bad: GenerationRequest, reason: str
) -> None:
    good = make_mixed_requests(4)
    completions = engine.generate([*good[:2], bad, *good[2:]])
    assert completions[:2] + completions[3:] == other.generate(good)
    assert (completions[2].finish_reason, completions[2].text) == ("error", "")
    assert reason in str(completions[2].error)
    assert "\n" not in str(completions[2].error)
    if "context" in reason:
        assert completions[2].error_code == "context_length_exceeded"


def test_a_prompt_is_measured_with_its_images(engine: Engine, other: Engine) -> None:
    request = make_request(1)
    (whole,) = engine.generate([request])
    before = engine.max_model_len
    try:
        for limit, expected in ((0, "error"), (1, "length")):
            other.max_model_len = engine.max_model_len = whole.num_prompt_tokens + limit
            (found,) = engine.generate([request])
            assert found.finish_reason == expected
            assert [found] == other.generate([request]) or expected == "error"
    finally:
        other.max_model_len = engine.max_model_len = before


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_num_seq", "no option of vLLM; did you mean max_num_seqs"),
        ("dtype", "say it by --dtype"),
        ("max_loras", "which this engine needs as it is"),
    ],
)
def test_options_of_vllm_are_checked_by_its_own_names(name: str, hint: str) -> None:
    with pytest.raises(OptionError, match=f"^--engine_options has .*{hint}"):
        check_engine(EngineConfig(engine="vllm", engine_options={name: 1}))
    check_engine(EngineConfig(engine="vllm", engine_options={"max_num_seqs": 1}))


def test_streamed_pieces_are_the_text(engine: Engine, other: Engine) -> None:
    requests = [make_request(n, n % 3, max_new_tokens=4 + 3 * n) for n in range(6)]
    pieces: list[tuple[int, str]] = []
    completions = engine.generate(requests, on_text=lambda index, text: pieces.append((index, text)))
    assert completions == other.generate(requests)
    for index, completion in enumerate(completions):
        assert "".join(text for place, text in pieces if place == index) == completion.text
    assert len(pieces) > 2 * len(requests)


def test_a_row_that_nobody_wants_ends_and_no_other_row_notices(engine: Engine) -> None:
    check_that_leavers_leave(engine)


def test_calls_share_the_engine(engine: Engine, other: Engine) -> None:
    calls = [make_mixed_requests(6), make_shared_requests(2), [make_request(n, 2) for n in range(5)]]
    expected = [other.generate(requests) for requests in calls]
    with ThreadPoolExecutor(3) as threads:
        assert [*threads.map(engine.generate, [engine.prepare(call) for call in calls])] == expected
    assert engine.waited_s > 0


def test_an_adapter_that_brings_a_head_of_its_own_is_refused(
    engine: Any, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = build_adapter(tmp_path / "head", tiny_model, **MIXING["lm_head-lora"])
    with pytest.raises(OptionError, match="all that vLLM answers exactly"):
        engine.load_adapter("head", str(adapter))


@pytest.mark.parametrize("kind", sorted(MIXING.keys() - {"lm_head-lora"}))
def test_base_and_adapters_mix_and_come_and_go(
    engine: Any, other: Any, tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    adapter = str(build_adapter(tmp_path / kind, tiny_model, **MIXING[kind]))
    rows = [make_request(n, n % 3) for n in range(6)]
    requests = [dataclasses.replace(row, adapter=name) for row in rows for name in (None, kind)]
    for each in (engine, other):
        each.load_adapter(kind, adapter)
    try:
        expected = other.generate(requests)
        assert engine.generate(requests) == expected
        assert texts(expected[::2]) != texts(expected[1::2])
        for refused in (kind, "one more than there is room for"):
            with pytest.raises(ValueError, match=r"loaded already|at most 1 adapters"):
                engine.load_adapter(refused, adapter)
    finally:
        for each in (engine, other):
            each.unload_adapter(kind)
    assert engine.generate(requests[:2])[1].finish_reason == "error"
    assert texts(engine.generate(rows)) == texts(expected[::2])


@pytest.mark.parametrize(
    "requests",
    [
        make_mixed_requests(num_logprobs=3),
        make_shared_requests(num_logprobs=0, repetition_penalty=1.5),
        make_formed_requests(num_logprobs=2),
    ],
    ids=["mixed", "penalized", "formed"],
)
def test_log_probabilities_are_those_of_the_other_engine(
    engine: Engine, other: Engine, requests: list[GenerationRequest]
) -> None:
    told: dict[int, list[TokenLogprob]] = {place: [] for place in range(len(requests))}
    streamed = engine.generate(requests, on_logprobs=lambda place, new: told[place].extend(new))
    assert [tuple(each) for each in told.values()] == [each.logprobs for each in streamed]
    answers = zip(requests, engine.generate(requests), other.generate(requests), strict=True)
    for request, found, expected in answers:
        assert found.text == expected.text
        assert found.logprobs is not None
        assert expected.logprobs is not None
        for mine, theirs in zip(found.logprobs, expected.logprobs, strict=True):
            if request.form is not None and theirs.data is None:
                continue  # of several end tokens vLLM's grammars allow one
            assert (mine.token, mine.data) == (theirs.token, theirs.data)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            pairs = zip(mine.top, theirs.top, strict=True)
            assert all(one.logprob == pytest.approx(other.logprob, abs=1e-3) for one, other in pairs)


def test_who_asks_for_none_gets_none(engine: Engine) -> None:
    first, second = engine.generate([make_request(0, 1), make_request(1, 1, num_logprobs=1)])
    assert first.logprobs is None
    assert second.logprobs is not None
    assert len(second.logprobs) == second.num_completion_tokens


def test_the_engine_says_that_its_process_died(engine: Any) -> None:
    """The last: the engine is gone behind it, and with it all its processes."""
    mine = "VLMRAY_STARTED_BY", os.environ["VLMRAY_STARTED_BY"]
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(engine.generate, make_mixed_requests(18, max_new_tokens=400, ignore_eos=True))
        (core,) = [each for each in marked(*mine) if "EngineCore" in " ".join(each.cmdline())]
        core.kill()
        with pytest.raises(DeadEngineError, match="process has ended"):
            call.result(120)
    with pytest.raises(DeadEngineError):
        engine.generate(make_mixed_requests(2))
    engine.close()
    assert not marked(*mine)
