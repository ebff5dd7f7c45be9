"""The engine's contract: one to one, in order, and no row depends on its neighbours."""

from __future__ import annotations

import copy
import dataclasses
import io
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.engines.fake import FakeEngine, build_tiny_random_adapter
from vlmray.engines.transformers import engine as module
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.engines.transformers.in_flight import Prepared
from vlmray.models.processors import load_processor
from vlmray.schema import Completion, GenerationRequest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SIZES = [(56, 84), (120, 200), (200, 96), (300, 180), (90, 90)]
QUESTIONS = [
    "What is the value of Germany?",
    "How many people in 2008?",
    "Which color is highest?",
    "Yes or no?",
]


def make_image(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth random picture: flat patches, so that the vision tower sees more than noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def make_request(number: int, num_images: int = 1, **options: Any) -> GenerationRequest:
    images = [make_image(10 * number + k, SIZES[(number + k) % len(SIZES)]) for k in range(num_images)]
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
    return GenerationRequest(
        request_id=f"test-{number:06d}",
        messages=[{"role": "user", "content": parts}],
        images=images,
        **{"max_new_tokens": 12, **options},
    )


def make_mixed_requests(count: int = 18, **options: Any) -> list[GenerationRequest]:
    """Text-only, one-image and two-image rows of several sizes, in turn."""
    return [make_request(number, number % 3, **options) for number in range(count)]


def generate_alone(model: Any, processor: Any, request: GenerationRequest) -> str:
    """What transformers itself writes for one row without any batching: the reference."""
    prompt = processor.apply_chat_template(request.messages, add_generation_prompt=True)
    inputs = processor(text=prompt, images=request.images or None, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=request.max_new_tokens)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load(folder: Path) -> Any:
    """Load a model onto the device that the engine would use."""
    return AutoModelForImageTextToText.from_pretrained(folder).eval().to(DEVICE)


def texts(completions: list[Completion]) -> list[str]:
    assert [c.error for c in completions] == [None] * len(completions)
    return [c.text for c in completions]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load(tiny_model)


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return load_processor(str(tiny_model))


@pytest.fixture
def make_engine(model: Any, processor: Any) -> Iterator[Callable[..., TransformersEngine]]:
    engines: list[TransformersEngine] = []

    def make(**options: Any) -> TransformersEngine:
        engines.append(TransformersEngine(model, processor, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(params=[1.0, 1.05, 1.5])
def repetition_penalty(request: pytest.FixtureRequest, model: Any) -> Iterator[float]:
    """Run the test under each penalty in the model's generation config; real Qwen2.5-VL has 1.05."""
    before = copy.deepcopy(model.generation_config)
    model.generation_config.repetition_penalty = request.param
    yield request.param
    model.generation_config = before


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


def make_shared_requests(num_images: int = 4, **options: Any) -> list[GenerationRequest]:
    """Every question about every image, as bytes of their own, in an order that mixes the images."""
    requests = [
        dataclasses.replace(
            make_request(number % len(QUESTIONS), **options),
            request_id=f"shared-{number:06d}",
            messages=make_request(number % len(QUESTIONS), 1).messages,
            images=[encode_png(make_image(50 + number // len(QUESTIONS), SIZES[number // len(QUESTIONS)]))],
        )
        for number in range(num_images * len(QUESTIONS))
    ]
    random.Random(1).shuffle(requests)
    return requests


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def decode(request: GenerationRequest) -> GenerationRequest:
    images = [Image.open(io.BytesIO(cast(bytes, data))).convert("RGB") for data in request.images]
    return dataclasses.replace(request, images=images)


def copy_no_rows(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an engine run every row whole, as it does where nothing is known of a model."""
    monkeypatch.setattr(engine.forward, "copies_rows", False)  # fails where there is no such attribute
    assert cast(Prepared, engine.prepare([make_request(1)])).rows[0].head is None


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


def text_request(text: str, **options: Any) -> GenerationRequest:
    return dataclasses.replace(make_request(0, 0, **options), messages=[{"role": "user", "content": text}])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (dataclasses.replace(make_request(1), images=[]), "1 image places for 0 images"),
        (dataclasses.replace(make_request(1, 0), images=[make_image(0, (60, 60))]), "0 image places"),
        (dataclasses.replace(make_request(1), images=[make_image(0, (6000, 2))]), "aspect ratio"),
        (dataclasses.replace(make_request(1), images=[cast(Any, "not an image")]), "Error"),
        (text_request("one <|image_pad|> of my own"), "1 image tokens"),
        (text_request("a <|video_pad|> of my own"), "video"),
        (make_request(1, adapter="missing"), "unknown adapter 'missing'; known: none"),
        (make_request(1, max_new_tokens=0), "max_new_tokens must be at least 1"),
        (make_request(1, temperature=float("nan")), "temperature must be 0 or more"),
        (make_request(1, top_p=0.0), "top_p must be above 0"),
        (dataclasses.replace(make_request(1, 0), messages=[{"role": "user"}]), "content"),
    ],
)
def test_a_bad_row_is_an_error_completion_and_leaves_its_neighbours_alone(
    make_engine: Any, bad: GenerationRequest, reason: str
) -> None:
    good = make_mixed_requests(4)
    expected = make_engine().generate(good)
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


def test_adapters_and_base_mix_in_one_call_and_match_peft(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, processor: Any
) -> None:
    from peft import PeftModel

    second = build_tiny_random_adapter(tmp_path / "second", tiny_model, seed=2)
    rows = [make_request(n, n % 3) for n in range(6)]
    expected: dict[str | None, list[str]] = {}
    for name, path in ((None, None), ("chart-v1.0", tiny_adapter), ("b", second)):
        base = load(tiny_model)
        peft_model = base if path is None else PeftModel.from_pretrained(base, path)
        expected[name] = [generate_alone(peft_model, processor, row) for row in rows]
    engine = TransformersEngine(load(tiny_model), processor)
    engine.load_adapter("chart-v1.0", str(tiny_adapter))
    engine.load_adapter("b", str(second))
    names = [None, "chart-v1.0", "b"]
    requests = [dataclasses.replace(row, adapter=name) for row in rows for name in names]
    found = texts(engine.generate(requests))
    for place, name in enumerate(names):
        assert found[place::3] == expected[name]
    assert len({tuple(column) for column in expected.values()}) == 3
    with pytest.raises(ValueError, match="loaded already"):
        engine.load_adapter("b", str(second))
    engine.close()


def test_adapters_and_base_share_a_forward_pass(
    tiny_model: Path, tiny_adapter: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(load(tiny_model), processor)
    engine.load_adapter("named", str(tiny_adapter))
    passes = []
    generate = engine.model.generate
    monkeypatch.setattr(
        engine.model,
        "generate",
        lambda **kwargs: passes.append(kwargs["input_ids"].shape) or generate(**kwargs),
    )
    texts(engine.generate([make_request(n, adapter=None if n % 2 else "named") for n in range(6)]))
    assert [shape[0] for shape in passes] == [6]
    engine.close()


def test_adapters_of_the_vision_tower_are_kept_apart(
    tiny_model: Path, tiny_adapter: Path, tmp_path: Path, processor: Any
) -> None:
    seeing = build_tiny_random_adapter(tmp_path / "seeing", tiny_model, seed=3, lora_vision=True)
    engine = TransformersEngine(load(tiny_model), processor)
    rows = [make_request(n) for n in range(4)]
    for name, path in (("reading", tiny_adapter), ("seeing", seeing)):
        engine.load_adapter(name, str(path))
    names = [None, "reading", "seeing"]
    alone = [texts(engine.generate([dataclasses.replace(r, adapter=name) for r in rows])) for name in names]
    mixed = texts(engine.generate([dataclasses.replace(r, adapter=name) for r in rows for name in names]))
    assert [mixed[place::3] for place in range(3)] == alone
    assert len(set(map(tuple, alone))) == 3
    engine.close()


def test_an_unloaded_adapter_is_unknown_and_can_be_loaded_again(
    tiny_model: Path, tiny_adapter: Path, processor: Any
) -> None:
    engine = TransformersEngine(load(tiny_model), processor)
    row = make_request(1)
    base = texts(engine.generate([row]))
    engine.load_adapter("named", str(tiny_adapter))
    named = texts(engine.generate([dataclasses.replace(row, adapter="named")]))
    engine.unload_adapter("named")
    (completion,) = engine.generate([dataclasses.replace(row, adapter="named")])
    assert completion.error == "ValueError: unknown adapter 'named'; known: none"
    assert texts(engine.generate([row])) == base
    with pytest.raises(ValueError, match="no adapter named 'named' is loaded; known: none"):
        engine.unload_adapter("named")
    engine.load_adapter("named", str(tiny_adapter))
    assert texts(engine.generate([dataclasses.replace(row, adapter="named")])) == named != base
    engine.close()


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


class Readers:
    """Those who read answers: some leave after so many pieces, each with a place and a number."""

    def __init__(self, leave_after: dict[int, int]) -> None:
        self.pieces: dict[int, list[str]] = defaultdict(list)
        self.ends: list[int] = []
        self._leave_after = leave_after

    def read(self, index: int, text: str) -> None:
        assert not self.has_left(index), "told after it had left"
        self.pieces[index].append(text)

    def has_left(self, index: int) -> bool:
        return len(self.pieces[index]) >= self._leave_after.get(index, 10**6)

    def answer(self, engine: Engine, requests: list[GenerationRequest]) -> list[Completion]:
        return engine.generate(
            requests,
            on_text=self.read,
            on_end=lambda index, completion: self.ends.append(index),
            cancelled=self.has_left,
        )


@pytest.fixture(params=["transformers", "transformers, rows unshared", "LLaVA", "fake"])
def any_engine(
    request: pytest.FixtureRequest, make_engine: Any, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """Every engine, and every way that one of them takes."""
    if request.param == "fake":
        yield build_engine(engine="fake", model_id="fake?answer=one+two+three+four+five+six+seven+eight")
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
    requests = make_mixed_requests(9, max_new_tokens=24)
    undisturbed = Readers({})
    whole = undisturbed.answer(any_engine, requests)
    leavers = {1: 1, 2: 2, 5: 0, 7: 3}  # place and pieces; the batch of some goes on without them
    assert min(len(undisturbed.pieces[place]) for place in leavers) > 4  # else nothing is cut off
    readers = Readers(leavers)
    found = readers.answer(any_engine, requests)
    assert sorted(readers.ends) == list(range(9))
    for place, (before, after) in enumerate(zip(whole, found, strict=True)):
        assert after.text == "".join(readers.pieces[place])
        if place not in leavers:
            assert after == before
            continue
        assert (after.finish_reason, after.error) == ("cancelled", None)
        assert before.text.startswith(after.text)
        assert len(readers.pieces[place]) == leavers[place]
        assert leavers[place] <= after.num_completion_tokens < before.num_completion_tokens
    assert found[5].num_completion_tokens == 0


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


def test_a_default_adapter_answers_requests_that_name_none(tiny_model: Path, tiny_adapter: Path) -> None:
    rows = make_mixed_requests(4)
    base = build_engine(engine="transformers", model_id=str(tiny_model))
    assert isinstance(base, TransformersEngine)
    base.load_adapter("named", str(tiny_adapter))
    named = texts(base.generate([dataclasses.replace(row, adapter="named") for row in rows]))
    tuned = build_engine(engine="transformers", model_id=str(tiny_model), adapter=str(tiny_adapter))
    assert texts(tuned.generate(rows)) == named != texts(base.generate(rows))


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
    with pytest.raises(ValueError, match=r"unknown engine 'vlm'.*transformers, fake"):
        build_engine(engine="vlm", model_id="tiny-random")
    with pytest.raises(ValueError, match="--batch_size must be at least 1, got 0"):
        TransformersEngine(None, None, batch_size=0)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("vlmray.engines", {"torch", "transformers", "ray", "peft"}),
        ("vlmray.engines.fake", {"torch", "transformers", "ray", "peft"}),
        ("vlmray.models.checks", {"torch", "transformers", "ray", "peft", "PIL", "numpy"}),
        ("vlmray.engines.transformers.engine", {"ray", "peft", "bitsandbytes"}),
    ],
)
def test_importing_stays_light(module: str, unwanted: set[str]) -> None:
    script = f"import sys, {module}; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not unwanted & set(output.stdout.split())


@pytest.fixture(scope="module")
def tiny_llava(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA: another family, whose images are (N, 3, H, W) and whose processor has no video part."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlavaConfig, LlavaProcessor, Qwen2Config
    from transformers import LlavaForConditionalGeneration as Llava

    folder = tmp_path_factory.mktemp("models") / "llava"
    qwen = load_processor(str(tiny_model))
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ),
        tokenizer=qwen.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<|image_pad|>",
        num_additional_image_tokens=1,
        chat_template=qwen.chat_template,
    ).save_pretrained(folder)
    shared: dict[str, Any] = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, image_size=56, patch_size=14, **shared),
        text_config=Qwen2Config(vocab_size=512, hidden_size=64, num_key_value_heads=1, **shared),
        image_token_index=qwen.image_token_id,
    )
    torch.manual_seed(0)
    model = Llava(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(
                parameter, std=1.0 if "embed" in name else 1.5 / parameter[0].numel() ** 0.5
            )
    model.generation_config.update(
        eos_token_id=qwen.tokenizer.eos_token_id, pad_token_id=qwen.tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    return folder


def test_another_model_family_is_answered_just_as_exactly(tiny_llava: Path) -> None:
    engine = build_engine(engine="transformers", model_id=str(tiny_llava), batch_size=4)
    assert isinstance(engine, TransformersEngine)
    requests = make_mixed_requests(9)
    expected = [generate_alone(engine.model, engine.processor, request) for request in requests]
    assert texts(engine.generate(requests)) == expected
    assert len(set(expected)) > 6
    bad = text_request("one <|image_pad|> of my own")
    assert (
        engine.generate([bad])[0].error == "ValueError: the prompt has 1 image tokens where its images give 0"
    )
    with pytest.raises(ValueError, match="--max_pixels do not apply to CLIPImageProcessorPil"):
        load_processor(str(tiny_llava), max_pixels=10_000)
