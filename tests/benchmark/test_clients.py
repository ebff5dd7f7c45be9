"""What a server is asked of a request, and what it is not told."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from helpers.gateways import KEY, Backend, serving
from vlmray.benchmark.clients import Clients
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
