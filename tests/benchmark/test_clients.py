"""What a server is asked of a request, and what it is not told."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from benchmarks.common.faulty_server import MODEL, Faults, FaultyServer, answer_to
from helpers.gateways import KEY, Backend, serving
from vlmray.benchmark.clients import Clients
from vlmray.engines.openai import asking
from vlmray.engines.openai.client import EndpointError
from vlmray.schema import GenerationRequest

PLAIN = GenerationRequest(
    request_id="chat", messages=[{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]
)


@pytest.mark.parametrize(
    "request_",
    [
        PLAIN,
        dataclasses.replace(
            PLAIN, max_new_tokens=9, min_new_tokens=3, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1,
            repetition_penalty=1.0, presence_penalty=0.5, frequency_penalty=-0.5, seed=4, stop=("x",),
        ),
    ],
)  # fmt: skip
def test_a_request_arrives_as_it_was(request_: GenerationRequest) -> None:
    backend = Backend()

    async def ask(url: str) -> None:
        async with Clients(url, KEY) as clients:
            assert (await clients.ask("fake", request_)).completion.error is None

    with serving(backend) as (url, _):
        asyncio.run(ask(url))
    assert backend.requests == [request_]


def _requests(count: int) -> list[GenerationRequest]:
    texts = [[{"type": "text", "text": f"How many are {number}?"}] for number in range(count)]
    return [dataclasses.replace(PLAIN, messages=[{"role": "user", "content": text}]) for text in texts]


def test_answers_take_what_the_server_does_and_measurements_what_was_said() -> None:
    async def ask(url: str) -> None:
        async with Clients(url) as clients:
            found = clients.answer_all(MODEL, _requests(120), 32, pytest.fail)
            timed = sorted([each async for each in found], key=lambda each: each.index)
            assert [each.completion.text for each in timed] == [
                answer_to(f'["How many are {number}?"]') for number in range(120)
            ]
            assert 0 < len(server.seen.over) < 60  # it was tried, and then left alone
            server.seen.curve.clear()
            measured = clients.keep_asking(MODEL, _requests(30), 6, stream=True)
            assert all([each.ttft_s is not None async for each in measured])
            assert max(count for _, count in server.seen.curve) == 6

    with FaultyServer(Faults(capacity=8, latency_s=0.05, drop=0.02)).running() as server:
        asyncio.run(ask(server.url))


def test_a_measurement_gives_up_a_server_that_goes_on_refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_FIRST_PAUSE_S", 0.001)

    async def ask(url: str) -> None:
        async with Clients(url) as clients:
            await clients.ask(MODEL, PLAIN)

    with (
        FaultyServer(Faults(capacity=0)).running() as server,
        pytest.raises(EndpointError, match="does not answer: over capacity"),
    ):
        asyncio.run(ask(server.url))
