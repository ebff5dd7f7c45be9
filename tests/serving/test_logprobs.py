"""How likely tokens were, over HTTP: what the official client parses, whole and in streams."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from helpers.charts import dataset
from helpers.gateways import KEY, Backend, ask, data_uri, serving
from vlmray.config import ServeConfig
from vlmray.engines import build_engine
from vlmray.engines.openai.engine import OpenAIEngine
from vlmray.engines.openai.flow import Flow
from vlmray.engines.openai.shares import LocalKeeper
from vlmray.schema import GenerationRequest
from vlmray.serving import replica as module
from vlmray.serving.backend import Piece, Reply
from vlmray.serving.replica import ModelReplica


@pytest.fixture(scope="module")
def model_url() -> Iterator[str]:
    """A gateway over the built-in model."""
    backend: Any = Backend()
    backend.engine = build_engine(engine="transformers", model_id="builtin")
    with serving(backend) as (url, _):
        yield url
    backend.engine.close()


def asked(**fields: Any) -> dict[str, Any]:
    row = dataset()[0]
    return ask(row["question"], data_uri(row["image"]), logprobs=True, **fields)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def test_the_official_client_parses_whole_answers(model_url: str) -> None:
    (choice,) = client_of(model_url).chat.completions.create(**asked(top_logprobs=2)).choices
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    *words, end = tokens
    assert b"".join(bytes(each.bytes or ()) for each in words).decode() == choice.message.content
    assert (end.token, end.bytes) == ("<|im_end|>", None)
    for token in tokens:
        best, second = token.top_logprobs
        assert (best.token, best.logprob) == (token.token, token.logprob)  # it is greedy
        assert second.logprob < best.logprob <= 0


def test_nothing_is_said_unasked(model_url: str) -> None:
    (choice,) = client_of(model_url).chat.completions.create(**asked() | {"logprobs": False}).choices
    assert choice.logprobs is None


def test_streams_have_them_beside_their_text(client: openai.OpenAI, backend: Backend) -> None:
    whole = client.chat.completions.create(**asked(top_logprobs=3)).choices[0].logprobs
    with client.chat.completions.stream(**asked(top_logprobs=3)) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        gathered = stream.get_final_completion().choices[0].logprobs
    assert whole is not None
    assert gathered is not None
    assert gathered.content == whole.content
    told = [each for chunk in chunks for each in chunk.choices if each.logprobs]
    assert len(told) == len(whole.content or [])  # a word is a token, and a piece
    assert all(each.delta.content for each in told)


def test_a_replica_sends_them_with_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.serve, "multiplexed", lambda load, **options: load)
    words = "+".join("abcdefgh")
    config = ServeConfig(
        model_id=f"fake?answer={words}&token_s=0.002", engine="fake", stream_interval_s=0.005
    )

    async def read(stream: bool) -> list[str | Piece | Reply]:
        request = GenerationRequest(
            request_id="x", messages=[{"role": "user", "content": "x"}], num_logprobs=1
        )
        return [piece async for piece in ModelReplica(config).answer(request, stream)]

    *pieces, end = asyncio.run(read(stream=True))
    assert isinstance(end, Reply)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert len(pieces) < 8  # several words in one
    told = tuple(token for piece in pieces if isinstance(piece, Piece) for token in piece.logprobs)
    assert told == end.completion.logprobs
    assert "".join(piece.text for piece in pieces if isinstance(piece, Piece)) == "a b c d e f g h"
    (alone,) = asyncio.run(read(stream=False))
    assert isinstance(alone, Reply)
    assert alone.completion.logprobs == told


def test_an_engine_that_asks_the_server_has_what_the_server_has(model_url: str) -> None:
    row = dataset()[0]
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    request = GenerationRequest(
        request_id="x", messages=[{"role": "user", "content": content}], images=[row["image"]], num_logprobs=4
    )
    engine: Any = OpenAIEngine(model_url, "fake", LocalKeeper(Flow(1)), key=KEY)
    local: Any = build_engine(engine="transformers", model_id="builtin")
    told: list[Any] = []
    options: list[dict[str, Callable[..., Any]]] = [{}, {"on_text": lambda *_: None}]
    (expected,) = local.generate([request])
    for each in options:
        (found,) = engine.generate([request], on_logprobs=lambda place, new: told.append(new), **each)
        assert found.text == expected.text
        assert found.logprobs is not None
        assert [(t.token, t.data, len(t.top)) for t in found.logprobs] == [
            (t.token, t.data, 4) for t in expected.logprobs
        ]
        for mine, theirs in zip(found.logprobs, expected.logprobs, strict=True):
            assert math.isclose(mine.logprob, theirs.logprob, abs_tol=1e-5)
        assert told.pop() == found.logprobs
    engine.close()
    local.close()
