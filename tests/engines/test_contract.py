"""The engine's contract: one to one, in order, and no row depends on its neighbours."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from helpers.engines import (
    generate_alone,
    make_image,
    make_mixed_requests,
    make_request,
    make_shared_requests,
    text_request,
    texts,
)
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.engines.fake import FakeEngine
from vlmray.engines.transformers import engine as module
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.models.processors import load_processor
from vlmray.schema import Completion, GenerationRequest


def test_greedy_text_equals_transformers_alone_at_any_batch_size_and_order(
    model: Any, processor: Any, make_engine: Any, repetition_penalty: float
) -> None:
    requests = make_mixed_requests()
    expected = [generate_alone(model, processor, request) for request in requests]
    assert len(set(expected)) > 12  # otherwise equality says little
    order = list(range(len(requests)))
    random.Random(0).shuffle(order)
    for batch_size in (1, 4, 16):
        engine = make_engine(batch_size=batch_size)
        assert texts(engine.generate(requests)) == expected
        shuffled = texts(engine.generate([requests[place] for place in order]))
        assert shuffled == [expected[place] for place in order]


def test_rows_that_have_ended_leave_the_forward_pass(model: Any, make_engine: Any) -> None:
    requests = [make_request(n, n % 3, max_new_tokens=12 if n % 4 == 0 else 2) for n in range(8)]
    alone = texts(make_engine(batch_size=1).generate(requests))
    num_rows: list[int] = []
    language_model = model.model.language_model
    hook = language_model.register_forward_hook(
        lambda module, args, kwargs, output: num_rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    try:
        assert texts(make_engine(batch_size=8).generate(requests)) == alone
    finally:
        hook.remove()
    assert max(num_rows) > 2
    assert num_rows.count(max(num_rows)) <= 3  # a forward pass for each of two tokens, of prompts with images
    assert sum(num_rows) < 8 * 4 + 2 * 12


def test_a_batch_has_no_more_tokens_than_it_may(model: Any, make_engine: Any) -> None:
    requests = [make_request(n, 1) for n in range(12)]
    completions = make_engine(batch_size=12).generate(requests)
    longest = max(completion.num_prompt_tokens for completion in completions)
    sizes: list[int] = []
    hook = model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(kwargs["inputs_embeds"].shape[:2].numel()),
        with_kwargs=True,
    )
    try:
        engine = make_engine(batch_size=12, max_batch_tokens=3 * longest)
        assert engine.generate(requests) == completions
    finally:
        hook.remove()
    assert longest < max(sizes) <= 3 * longest


def test_a_row_stops_at_its_own_limit_and_counts_its_own_tokens(
    model: Any, processor: Any, make_engine: Any
) -> None:
    requests = [make_request(n, n % 3, max_new_tokens=limit) for n, limit in enumerate((1, 30, 5, 2, 17, 9))]
    completions = make_engine().generate(requests)
    assert texts(completions) == [generate_alone(model, processor, request) for request in requests]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for request, completion in zip(requests, completions, strict=True):
        inputs = processor(text=completion.prompt, images=request.images or None, return_tensors="pt")
        assert completion.num_prompt_tokens == inputs["input_ids"].shape[1]
        assert completion.prompt.count("<|image_pad|>") == len(request.images)
        if completion.finish_reason == "length":
            assert completion.num_completion_tokens == request.max_new_tokens
        else:
            assert 1 <= completion.num_completion_tokens <= request.max_new_tokens


def test_answers_depend_on_the_image_and_on_the_question(make_engine: Any) -> None:
    base = make_request(1)
    other_image = dataclasses.replace(base, images=[make_image(99, base.images[0].size)])
    other_question = dataclasses.replace(base, messages=make_request(2).messages)
    assert len(set(texts(make_engine().generate([base, other_image, other_question])))) == 3


def test_sampled_texts_depend_on_seed_and_id_but_not_on_batch_or_order(make_engine: Any) -> None:
    requests = make_mixed_requests(9, temperature=1.0, top_p=0.9, seed=3)
    mixed = [request if n % 2 else make_request(n, 1) for n, request in enumerate(requests)]
    alone = texts(make_engine(batch_size=1).generate(mixed))
    assert texts(make_engine(batch_size=16).generate(mixed[::-1])) == alone[::-1]
    greedy = texts(make_engine().generate(make_mixed_requests(9)))
    sampled = texts(make_engine().generate(requests))
    reseeded = texts(make_engine().generate([dataclasses.replace(r, seed=4) for r in requests]))
    renamed = texts(make_engine().generate([dataclasses.replace(r, request_id="x") for r in requests]))
    for others in (greedy, reseeded, renamed):
        assert sum(a != b for a, b in zip(sampled, others, strict=True)) >= 8


def test_out_of_memory_halves_the_batch_and_loses_no_row(
    model: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_mixed_requests(12)
    expected = texts(make_engine().generate(requests))
    sizes: list[int] = []
    real = model.generate

    def generate(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(**inputs)

    monkeypatch.setattr(model, "generate", generate)
    engine = make_engine(batch_size=8)
    assert texts(engine.generate(requests)) == expected
    failures = sum(size > 2 for size in sizes)
    sizes.clear()
    assert texts(engine.generate(requests)) == expected
    assert sum(size > 2 for size in sizes) < failures  # it remembers


def test_a_row_too_large_for_memory_fails_alone(
    model: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [make_request(n, 1) for n in range(6)]
    expected = make_engine().generate(requests)
    widest = max(c.num_prompt_tokens for c in expected)
    real = model.generate

    def generate(**inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] >= widest:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
            )
        return real(**inputs)

    monkeypatch.setattr(model, "generate", generate)
    for before, after in zip(expected, make_engine().generate(requests), strict=True):
        if before.num_prompt_tokens < widest:
            assert after == before
        else:
            assert (after.finish_reason, after.text) == ("error", "")
            assert "--max_pixels" in str(after.error)


def test_other_failures_of_the_model_are_raised(
    model: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(**inputs: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        make_engine().generate([make_request(0)])


@pytest.fixture(scope="module")
def neighbours(model: Any, processor: Any) -> tuple[list[GenerationRequest], list[Completion]]:
    """Good requests, and what an engine answers to them alone."""
    good = make_mixed_requests(4)
    with contextlib.closing(TransformersEngine(model, processor)) as engine:
        return good, engine.generate(good)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (dataclasses.replace(make_request(1), images=[]), "1 image places for 0 images"),
        (dataclasses.replace(make_request(1, 0), images=[make_image(0, (60, 60))]), "0 image places"),
        (dataclasses.replace(make_request(1), images=[make_image(0, (6000, 2))]), "aspect ratio"),
        (dataclasses.replace(make_request(1), images=[cast(Any, "not an image")]), "Error"),
        (make_request(1, adapter="missing"), "unknown adapter 'missing'; known: none"),
        (make_request(1, max_new_tokens=0), "max_new_tokens must be at least 1"),
        (make_request(1, temperature=float("nan")), "temperature must be at least 0"),
        (make_request(1, top_p=0.0), "top_p must be above 0"),
        (dataclasses.replace(make_request(1, 0), messages=[{"role": "user"}]), "content"),
    ],
)
def test_a_bad_row_is_an_error_completion_and_leaves_its_neighbours_alone(
    make_engine: Any, neighbours: tuple[list[GenerationRequest], list[Completion]],
    bad: GenerationRequest, reason: str,
) -> None:  # fmt: skip
    good, expected = neighbours
    completions = make_engine().generate([*good[:2], bad, *good[2:]])
    assert completions[:2] + completions[3:] == expected
    assert (completions[2].finish_reason, completions[2].text) == ("error", "")
    assert reason in str(completions[2].error)
    assert "\n" not in str(completions[2].error)


def test_requests_are_made_ready_while_the_model_works(make_engine: Any) -> None:
    first, second = make_mixed_requests(5), [*make_shared_requests(2), make_request(1, adapter="missing")]
    engine = make_engine(batch_size=2)
    expected = [engine.generate(requests) for requests in (first, second)]
    heard: list[int] = []
    with ThreadPoolExecutor(1) as other:

        def prepare_the_next(place: int, completion: Completion) -> None:
            heard.append(place)
            if len(heard) == 1:
                ready.append(other.submit(engine.prepare, second).result(timeout=60))

        ready = [engine.prepare(first)]
        assert list(ready[0]) == first
        assert engine.generate(ready[0], on_end=prepare_the_next) == expected[0]
        assert sorted(heard) == list(range(5))
        waited_s = engine.waited_s
        heard.clear()
        assert engine.generate(ready[1], on_end=lambda place, completion: heard.append(place)) == expected[1]
        assert sorted(heard) == list(range(len(second)))
        assert expected[1][-1].error is not None
        assert engine.waited_s >= waited_s


def test_requests_are_not_changed(make_engine: Any) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Yes or no?"}]
    request = dataclasses.replace(make_request(1), messages=[{"role": "user", "content": parts}])
    before = copy.deepcopy(request.messages)
    assert make_engine().generate([request])[0].error is None
    assert request.messages == before


def test_no_warning_reaches_the_user_when_the_checkpoint_samples_by_default(
    model: Any, make_engine: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    before = copy.deepcopy(model.generation_config)
    model.generation_config.update(do_sample=True, temperature=1e-6, top_p=0.001, top_k=1)
    try:
        make_engine().generate(make_mixed_requests(4))
    finally:
        model.generation_config = before
    assert caplog.text == ""
    assert "generation" not in capfd.readouterr().err


def test_every_engine_meets_the_protocol(make_engine: Any) -> None:
    fake = build_engine(engine="fake", model_id="fake")
    assert isinstance(fake, FakeEngine)
    for engine in (make_engine(), fake):
        assert isinstance(engine, Engine)
        assert engine.generate([]) == []


def test_waiting_is_what_the_model_cannot_work_in(
    model: Any, make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, clock = make_engine(batch_size=2), [0.0]

    def take(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            clock[0] += seconds
            return function(*args, **kwargs)

        return timed

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(engine, "_open", take(1, engine._open))
    monkeypatch.setattr(module, "wait", take(10, module.wait))
    monkeypatch.setattr(model, "generate", take(1000, model.generate))
    engine.generate([make_request(number) for number in range(4)])
    assert engine.waited_s == 4 * 1 + 2 * 10  # requests, batches
    engine.generate([make_request(0)])
    assert engine.waited_s == 5 * 1 + 3 * 10


def test_unknown_engine_and_options_name_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'vlm'.*transformers, .*fake"):
        build_engine(engine="vlm", model_id="tiny-random")
    with pytest.raises(ValueError, match="--batch_size must be at least 1, got 0"):
        TransformersEngine(None, None, batch_size=0)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("vlmray.engines", {"torch", "transformers", "ray", "peft"}),
        ("vlmray.engines.fake", {"torch", "transformers", "ray", "peft"}),
        ("vlmray.engines.openai.engine", {"torch", "transformers", "ray", "peft"}),
        ("vlmray.models.checks", {"torch", "transformers", "ray", "peft", "PIL", "numpy"}),
        ("vlmray.engines.transformers.engine", {"ray", "peft", "bitsandbytes"}),
    ],
)
def test_importing_stays_light(module: str, unwanted: set[str]) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not unwanted & set(output.stdout.split())


def test_another_model_family_is_answered_just_as_exactly(tiny_llava: Path) -> None:
    engine = build_engine(engine="transformers", model_id=str(tiny_llava), batch_size=4)
    assert isinstance(engine, TransformersEngine)
    requests = make_mixed_requests(9)
    expected = [generate_alone(engine.model, engine.processor, request) for request in requests]
    assert texts(engine.generate(requests)) == expected
    assert len(set(expected)) > 6
    odd = text_request("one <|image_pad|> of my own")
    (answered,) = engine.generate([odd])
    assert (answered.error, answered.prompt.count("<|image_pad|>")) == (None, 1)
    with pytest.raises(ValueError, match="--max_pixels do not apply to CLIPImageProcessorPil"):
        load_processor(str(tiny_llava), max_pixels=10_000)
