"""Rows that share an image, and what else is alike at their beginning, are answered as each alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest

from helpers.engines import (
    QUESTIONS,
    copy_no_rows,
    decode,
    encode_png,
    generate_alone,
    make_image,
    make_shared_requests,
    texts,
)
from vlmray.engines import build_engine
from vlmray.engines.fake import build_tiny_random_adapter
from vlmray.schema import GenerationRequest


def test_rows_that_share_an_image_are_answered_as_each_alone(
    model: Any, processor: Any, make_engine: Any, repetition_penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = make_shared_requests()
    expected = [generate_alone(model, processor, decode(request)) for request in requests]
    assert len(set(expected)) > 12
    for batch_size in (2, 3, 7, 16):
        assert texts(make_engine(batch_size=batch_size).generate(requests)) == expected
    requests = [dataclasses.replace(request, max_new_tokens=1 + n % 9) for n, request in enumerate(requests)]
    plain = make_engine(batch_size=16)
    copy_no_rows(plain, monkeypatch)
    # Prompts, token counts and reasons too.
    assert make_engine(batch_size=16).generate(requests) == plain.generate(requests)


def test_an_image_is_seen_once_for_all_its_questions(model: Any, make_engine: Any) -> None:
    requests = make_shared_requests()
    num_seen: list[int] = []
    hook = model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: num_seen.append(len(kwargs.get("grid_thw", args[-1]))), with_kwargs=True
    )
    try:
        make_engine(batch_size=16).generate(requests)
        assert sum(num_seen) == 4
        num_seen.clear()
        image = decode(requests[0]).images[0]
        make_engine(batch_size=16).generate(
            [dataclasses.replace(request, images=[image]) for request in requests]
        )
        assert sum(num_seen) == 1  # pictures that are decoded already are known by being the same object
    finally:
        hook.remove()


def test_rows_share_what_is_alike_up_to_the_last_image(model: Any, processor: Any, make_engine: Any) -> None:
    """Two images in both orders, two system prompts, and text before the images."""
    images = [encode_png(make_image(seed, (90, 120))) for seed in (1, 2)]
    requests = []
    for system in ("Be brief.", "Answer in one word, please."):
        for order in ([0, 1], [1, 0], [0, 0]):
            for question in QUESTIONS[:3]:
                parts = [{"type": "text", "text": "Compare"}, {"type": "image"}, {"type": "image"}]
                messages = [
                    {"role": "system", "content": [{"type": "text", "text": system}]},
                    {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
                ]
                requests.append(
                    GenerationRequest(
                        request_id=str(len(requests)), messages=messages, max_new_tokens=8,
                        images=[images[place] for place in order],
                    )
                )  # fmt: skip
    expected = [generate_alone(model, processor, decode(request)) for request in requests]
    assert len(set(expected)) > 9
    assert texts(make_engine(batch_size=16).generate(requests)) == expected


def test_adapters_have_beginnings_of_their_own(
    tiny_model: Path, tmp_path: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = cast(Any, build_engine(engine="transformers", model_id=str(tiny_model), batch_size=16))
    engine.load_adapter("one", str(tiny_adapter))
    engine.load_adapter("two", str(build_tiny_random_adapter(tmp_path / "two", tiny_model, seed=9)))
    requests = [
        dataclasses.replace(request, adapter=adapter)
        for request in make_shared_requests(2)
        for adapter in (None, "one", "two")
    ]
    shared = engine.generate(requests)
    assert len(set(texts(shared))) > 12
    copy_no_rows(engine, monkeypatch)
    assert shared == engine.generate(requests)
    engine.close()


def test_what_rows_share_counts_once(model: Any, make_engine: Any) -> None:
    requests = make_shared_requests(2)
    completions = make_engine(batch_size=32).generate(requests)
    longest = max(completion.num_prompt_tokens for completion in completions)
    num_images: list[int] = []
    hook = model.model.visual.register_forward_hook(
        lambda module, args, kwargs, output: num_images.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    try:
        engine = make_engine(batch_size=32, max_batch_tokens=(len(requests) - 1) * longest)
        assert engine.generate(requests) == completions
        assert num_images == [2]  # one batch, though all prompts together have more tokens
        num_images.clear()
        assert make_engine(batch_size=32, max_batch_tokens=longest).generate(requests) == completions
        assert len(num_images) >= 2
    finally:
        hook.remove()
