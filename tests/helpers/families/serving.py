"""The same requests through `infer`, as a batch file has them, and through a server, by OpenAI's client."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx2
from openai import AsyncOpenAI

from helpers.families.contract import Checkpoint
from vlmray.config import ServeConfig
from vlmray.dataset.chat.requests import read_request_row
from vlmray.dataset.rows import sample_row
from vlmray.engines.base import Engine
from vlmray.inference.stages import Task, generate_rows, prepare_rows
from vlmray.schema import GenerationRequest
from vlmray.serving.backend import Reply
from vlmray.serving.gateway import Gateway
from vlmray.serving.http.app import build_app
from vlmray.serving.replica import ModelReplica


def body_of(tiny: Checkpoint, request: GenerationRequest) -> dict[str, Any]:
    """Return a request as a client writes it."""
    images = iter(request.images)
    (message,) = request.messages
    content = [
        {"type": "image_url", "image_url": {"url": _uri(next(images))}} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {
        "model": tiny.name,
        "max_tokens": request.max_new_tokens,
        "messages": [{**message, "content": content}],
    }


def _uri(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def infer(engine: Engine, bodies: Sequence[dict[str, Any]]) -> list[str | None]:
    """Answer requests as `infer` does between reading its rows and writing them."""
    task = Task(prompt_template="{question}", metric="exact_match", models={bodies[0]["model"]: None})
    line = {"method": "POST", "url": "/v1/chat/completions"}
    rows = [
        sample_row(read_request_row({"custom_id": f"{number}", **line, "body": body}, f"test-{number:06d}"))
        for number, body in enumerate(bodies)
    ]
    return [row["prediction"] for row in generate_rows(prepare_rows(rows, task), engine, task)]


def serve(tiny: Checkpoint, bodies: Sequence[dict[str, Any]]) -> list[str | None]:
    """Answer requests as a server does, all at once, of which every other one is a stream."""
    config = ServeConfig(
        model_id=str(tiny.folder), served_model_name=tiny.name, engine="transformers", max_batch_size=4
    )
    backend = _Here(ModelReplica(config))
    return asyncio.run(_ask_all(build_app(Gateway(config, backend)), bodies))


class _Here:
    """A replica without Ray in between."""

    def __init__(self, replica: ModelReplica) -> None:
        self._replica = replica

    async def answer(self, request: GenerationRequest, *, stream: bool) -> AsyncGenerator[str | Reply]:
        async for piece in self._replica.answer(request, stream):
            yield piece

    async def is_ready(self) -> bool:
        return True

    async def max_model_len(self) -> int | None:
        return self._replica.max_model_len()


async def _ask_all(app: Any, bodies: Sequence[dict[str, Any]]) -> list[str | None]:
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport) as http:
        client = AsyncOpenAI(api_key="-", base_url="http://here/v1", http_client=http, max_retries=0)
        asked = [(_ask, _ask_stream)[number % 2](client, body) for number, body in enumerate(bodies)]
        return await asyncio.gather(*asked)


async def _ask(client: AsyncOpenAI, body: dict[str, Any]) -> str | None:
    answer = await client.chat.completions.create(**body)
    return answer.choices[0].message.content


async def _ask_stream(client: AsyncOpenAI, body: dict[str, Any]) -> str | None:
    stream = await client.chat.completions.create(**body, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
