"""The engine over real HTTP: a server that is as ours, and one that fails on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.common.faulty_server import MODEL, Faults, FaultyServer, answer_to
from helpers.engines import encode_png, make_image, make_mixed_requests, make_request
from helpers.gateways import KEY, Backend, serving
from helpers.processes import wait_until
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.engines.fake import FakeEngine
from vlmray.engines.openai import asking
from vlmray.engines.openai.client import EndpointError, api_key
from vlmray.engines.openai.engine import OpenAIEngine
from vlmray.schema import Form, GenerationRequest


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRAY_API_KEY", KEY)


@contextlib.contextmanager
def engine_of(url: str, model: str = MODEL, **options: Any) -> Iterator[Engine]:
    engine = build_engine(engine="openai", model_id=model, endpoint=url, **options)
    with contextlib.closing(engine):
        yield engine


@pytest.fixture
def ours() -> Iterator[tuple[Engine, Backend]]:
    """An engine that asks a server of ours over HTTP."""
    backend = Backend()
    with serving(backend) as (url, _), engine_of(url, "fake") as engine:
        yield engine, backend


def ask(number: int, **options: Any) -> GenerationRequest:
    parts = [{"type": "text", "text": f"How many are {number}?"}]
    return GenerationRequest(
        request_id=f"test-{number:06d}", messages=[{"role": "user", "content": parts}], **options
    )


def expected(number: int) -> str:
    return answer_to(f'["How many are {number}?"]')


def text_only(count: int) -> list[GenerationRequest]:
    return [ask(number) for number in range(count)]


# The contract


def test_it_answers_what_the_model_behind_the_server_does(ours: tuple[Engine, Backend]) -> None:
    engine, _ = ours
    requests = make_mixed_requests(12)
    alone = FakeEngine().generate(requests)
    assert isinstance(engine, Engine)
    assert engine.generate([]) == []
    found = engine.generate(requests)
    assert [dataclasses.replace(each, prompt="") for each in alone] == found
    ready = engine.prepare(requests[::-1])
    assert list(ready) == requests[::-1]
    assert engine.generate(ready) == found[::-1]
    assert engine.max_model_len is None


def test_the_server_is_told_what_the_answer_has_to_be(ours: tuple[Engine, Backend]) -> None:
    engine, backend = ours
    forms = [None, Form(schema='{"type": "null"}'), Form(choices=("a, b", "c")), Form(regex="[0-9]+")]
    backend.requests.clear()
    found = engine.generate([ask(number, form=form) for number, form in enumerate(forms)])
    texts = [each.text for each in found]
    assert texts[1:3] == ["null", "a, b"]
    assert texts[3].isdecimal()
    assert {request.form for request in backend.requests} == set(forms)


def test_what_a_server_had_cached_is_known_where_it_says_so(ours: tuple[Engine, Backend]) -> None:
    assert ours[0].generate([ask(1)])[0].num_cached_tokens is None
    with FaultyServer(Faults()).running() as server, engine_of(server.url) as engine:
        assert engine.generate([ask(1)])[0].num_cached_tokens == 4


def test_images_arrive_as_they_were_unless_bounds_scale_them() -> None:
    requests = [dataclasses.replace(make_request(1), images=[encode_png(make_image(3, (300, 180)))])]
    backend = Backend()
    with serving(backend) as (url, _):
        for bounds in ({}, {"max_pixels": 5400}, {"min_pixels": 216_000}):
            with engine_of(url, "fake", **bounds) as engine:
                assert engine.generate(requests)[0].error is None
    sent, smaller, larger = (cast(bytes, request.images[0]) for request in backend.requests)
    from vlmray.images.decoding import image_size

    assert sent == requests[0].images[0]
    assert image_size(smaller) == (94, 56)
    assert image_size(larger) == (600, 360)


BAD = [
    (dataclasses.replace(make_request(1), images=[]), "1 image places for 0 images"),
    (dataclasses.replace(make_request(1, 0), images=[make_image(0, (60, 60))]), "0 image places"),
    (dataclasses.replace(make_request(1), images=[cast(Any, b"no image")]), "cannot identify image"),
    (dataclasses.replace(make_request(1), images=[cast(Any, "not an image")]), "neither a data URI nor an"),
    (make_request(1, adapter="missing"), "unknown adapter 'missing'; known: none"),
    (make_request(1, max_new_tokens=0), "max_new_tokens must be at least 1"),
    (make_request(1, max_new_tokens=10**6), "at most 4096 are allowed"),
    (make_request(1, temperature=float("nan")), "temperature must be at least 0"),
    (dataclasses.replace(make_request(1, 0), messages=[{"role": "user"}]), "content"),
]


def test_a_bad_row_is_an_error_completion_and_leaves_its_neighbours_alone(
    ours: tuple[Engine, Backend],
) -> None:
    engine, _ = ours
    good = make_mixed_requests(4)
    before = engine.generate(good)
    found = engine.generate([*good[:2], *(bad for bad, _ in BAD), *good[2:]])
    assert found[:2] + found[-2:] == before
    for completion, (bad, reason) in zip(found[2:-2], BAD, strict=True):
        assert (completion.finish_reason, completion.text) == ("error", "")
        assert reason in str(completion.error)
        assert "\n" not in str(completion.error)
        ahead = engine.check(bad)
        assert ahead is None or ahead.error == completion.error
    assert engine.check(BAD[0][0]) is not None


def test_the_server_names_what_an_over_long_prompt_is(ours: tuple[Engine, Backend]) -> None:
    engine, backend = ours
    backend.engine = FakeEngine(max_model_len=4)
    (found,) = engine.generate([make_request(1)])
    assert found.error_code == "context_length_exceeded"


def test_sampled_rows_have_seeds_of_their_own(ours: tuple[Engine, Backend]) -> None:
    engine, backend = ours
    requests = [dataclasses.replace(ask(1, temperature=1.0, seed=3), request_id=f"r{n}") for n in range(8)]
    texts = [completion.text for completion in engine.generate(requests)]
    assert [completion.text for completion in engine.generate(requests[::-1])] == texts[::-1]
    assert len({request.seed for request in backend.requests}) == 8
    backend.requests.clear()
    engine.generate([ask(n, seed=3) for n in range(4)])
    assert {request.seed for request in backend.requests} == {3}


def test_several_threads_share_one_engine() -> None:
    with FaultyServer(Faults(latency_s=0.2)).running() as server, engine_of(server.url) as engine:
        engine.generate(text_only(40))  # it has found out that more may be in flight
        found: dict[int, list[str]] = {}

        def answer(part: int) -> None:
            requests = [ask(number) for number in range(part, 40, 4)]
            found[part] = [completion.text for completion in engine.generate(requests)]

        threads = [threading.Thread(target=answer, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {part: [expected(number) for number in range(part, 40, 4)] for part in range(4)}


# Servers that fail


def test_every_row_is_answered_by_a_server_that_fails_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_FIRST_PAUSE_S", 0.01)
    faults = Faults(
        refuse=0.05, unavailable=0.05, drop=0.1, capacity=12, latency_s=0.02, token_s=0.001, retry_after_s=0.1
    )
    with FaultyServer(faults).running() as server, engine_of(server.url) as engine:
        found = engine.generate(text_only(200))
        pieces: Counter[int] = Counter()
        texts: dict[int, str] = dict.fromkeys(range(60), "")

        def on_text(place: int, text: str) -> None:
            texts[place] += text
            pieces[place] += 1

        streamed = engine.generate(text_only(60), on_text=on_text)
    assert [(c.text, c.error) for c in found] == [(expected(n), None) for n in range(200)]
    assert [c.text for c in streamed] == list(texts.values()) == [expected(n) for n in range(60)]
    assert max(pieces.values()) > 3
    assert {"429", "503", "drop"} <= set(server.seen.faults)


def test_rows_that_the_server_refuses_are_asked_once(ours: tuple[Engine, Backend]) -> None:
    with FaultyServer(Faults()).running() as server, engine_of(server.url) as engine:
        found = engine.generate([ask(1), ask(2, stop=("x",)), dataclasses.replace(ask(3), messages=[
            {"role": "user", "content": [{"type": "text", "text": "unreadable"}]}])])  # fmt: skip
    assert [completion.error for completion in found] == [None, None, "ValueError: no such image"]
    assert found[2].error_code == "bad_image"
    assert len(server.seen.bodies) == 3


def test_a_stuck_answer_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmray.engines.openai.flow._LEAST_PATIENCE_S", 0.5)
    with FaultyServer(Faults(stall=0.3, latency_s=0.01)).running() as server, engine_of(server.url) as engine:
        found = engine.generate(text_only(30))
    assert [completion.text for completion in found] == [expected(number) for number in range(30)]
    assert server.seen.faults["stall"] > 1


def test_retry_after_is_heeded_by_all_requests() -> None:
    faults = Faults(refuse=0.1, latency_s=0.01, retry_after_s=1.0, seed=4)
    with FaultyServer(faults).running() as server, engine_of(server.url) as engine:
        engine.generate(text_only(60))
    starts = [at for (at, count), (_, before) in zip(server.seen.curve[1:], server.seen.curve, strict=False)
              if count > before]  # fmt: skip
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    assert sum(pause > 0.6 for pause in pauses) >= 2


def test_a_server_that_is_gone_is_given_up_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_FIRST_PAUSE_S", 0.01)
    with FaultyServer(Faults()).running() as server:
        engine = build_engine(engine="openai", model_id=MODEL, endpoint=server.url, endpoint_timeout_s=1)
    silent = pytest.raises(EndpointError, match=r"has not answered for \d+ s .*raise --endpoint_timeout_s")
    with contextlib.closing(engine), silent:
        engine.generate(text_only(20))


def test_a_server_that_comes_back_is_asked_on() -> None:
    with FaultyServer(Faults(latency_s=0.01)).running() as server:
        engine = build_engine(engine="openai", model_id=MODEL, endpoint=server.url)
    done: list[str] = []
    thread = threading.Thread(target=lambda: done.extend(c.text for c in engine.generate(text_only(9))))
    with contextlib.closing(engine):
        thread.start()
        time.sleep(0.3)
        with FaultyServer(Faults(latency_s=0.01)).running(int(server.url.rpartition(":")[2])):
            thread.join(60)
    assert done == [expected(number) for number in range(9)]


def test_nothing_is_left_in_flight_when_the_caller_is_interrupted() -> None:
    with FaultyServer(Faults(stall=1.0)).running() as server, engine_of(server.url) as engine:

        def interrupt(place: int) -> bool:
            if server.seen.in_flight >= 4:
                raise KeyboardInterrupt
            return False

        with pytest.raises(KeyboardInterrupt):
            engine.generate(text_only(20), cancelled=interrupt)
        wait_until(lambda: server.seen.in_flight == 0, timeout_s=10)


# Who asks


@pytest.mark.parametrize(
    ("model", "key", "message"),
    [
        ("nothing", KEY, "does not serve 'nothing'; it serves faulty"),
        (MODEL, "wrong", "does not list its models: wrong key"),
    ],
)
def test_a_wrong_name_or_key_is_found_at_once(
    model: str, key: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMRAY_API_KEY", key)
    with FaultyServer(Faults(key=KEY)).running() as server, pytest.raises(EndpointError, match=message):
        build_engine(engine="openai", model_id=model, endpoint=server.url)


def test_the_key_of_openai_goes_to_openai_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMRAY_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert api_key("https://api.openai.com/v1") == "secret"
    assert api_key("https://api.openai.com.example.org/v1") is None
    monkeypatch.setenv("VLMRAY_API_KEY", "own")
    assert api_key("https://api.openai.com/v1") == "own"


def test_closing_ends_the_thread_twice_is_harmless(ours: tuple[Engine, Backend]) -> None:
    engine, _ = ours
    assert isinstance(engine, OpenAIEngine)
    thread = engine._loop._thread
    engine.close()
    engine.close()
    assert not thread.is_alive()


def test_neither_torch_nor_a_tokenizer_is_loaded(tmp_path: Path) -> None:
    script = (
        "import sys, vlmray.inference.replica, vlmray.inference.plan, vlmray.inference.endpoint.checking\n"
        "from vlmray.engines import build_engine\n"
        "from vlmray.schema import GenerationRequest\n"
        f"engine = build_engine(engine='openai', model_id={MODEL!r}, endpoint=sys.argv[1])\n"
        "message = {'role': 'user', 'content': [{'type': 'text', 'text': 'Why?'}]}\n"
        "(found,) = engine.generate([GenerationRequest(request_id='0', messages=[message])])\n"
        "assert found.error is None\n"
        "engine.close()\n"
        "print(*sys.modules)\n"
    )
    with FaultyServer(Faults()).running() as server:
        done = subprocess.run(
            [sys.executable, "-c", script, server.url],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
    assert not {"torch", "transformers", "tokenizers"} & set(done.stdout.split())


def test_the_loop_is_not_held_up_by_images(ours: tuple[Engine, Backend]) -> None:
    engine, _ = ours
    assert isinstance(engine, OpenAIEngine)
    lag: list[float] = []

    async def watch() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            lag.append(time.monotonic() - before)

    watching = engine._loop.submit(watch())
    large = [encode_png(make_image(seed, (1600, 1200)).rotate(1)) for seed in range(3)]
    requests = [dataclasses.replace(make_request(1), images=[image]) for image in large]
    assert [completion.error for completion in engine.generate(requests)] == [None] * 3
    watching.cancel()
    assert sorted(lag)[len(lag) // 2] < 0.1
