"""A replica without Ray: who reads an answer decides how long it is worked on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.adapters import APART, MIXING, answer_by_peft, build_adapter
from vlmray.config import ServeConfig
from vlmray.models.processors import load_processor
from vlmray.schema import Completion, GenerationRequest
from vlmray.serving import replica as module
from vlmray.serving.backend import Reply
from vlmray.serving.replica import ModelReplica

LONG = "+".join(f"w{number}" for number in range(2000))


def ask(name: str = "x", **options: Any) -> GenerationRequest:
    messages = [{"role": "user", "content": name}]
    return GenerationRequest(request_id=name, messages=messages, **{"max_new_tokens": 10**6, **options})


@pytest.fixture
def make_replica(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelReplica]:
    """Replicas with the fake engine; what Serve does with adapters is left out."""
    monkeypatch.setattr(module.serve, "multiplexed", lambda load, **options: load)

    def make(model_id: str, **options: Any) -> ModelReplica:
        defaults: dict[str, Any] = {"engine": "fake", "max_batch_size": 1, "stream_interval_s": 0}
        return ModelReplica(ServeConfig(model_id=model_id, **(defaults | options)))

    return make


async def read(pieces: AsyncIterator[str | Reply]) -> Reply:
    """Read to the end."""
    async for piece in pieces:
        if isinstance(piece, Reply):
            return piece
    raise AssertionError("an answer without an end")


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def let_start(awaitable: Awaitable[Any]) -> asyncio.Future[Any]:
    task = asyncio.ensure_future(awaitable)
    await asyncio.sleep(0)
    return task


@pytest.mark.parametrize(("how", "stream"), [("closed", True), ("cancelled", True), ("cancelled", False)])
def test_the_engine_stops_within_a_token_of_the_reader(
    make_replica: Any, tmp_path: Path, how: str, stream: bool
) -> None:
    log = tmp_path / "tokens"
    log.touch()

    async def check() -> None:
        replica = make_replica(f"fake?answer={LONG}&token_s=0.01&token_log={log}")
        pieces = replica.answer(ask(), stream)
        if how == "closed":
            assert await anext(pieces) == "w0"
            await pieces.aclose()
        else:
            reading = asyncio.create_task(read(pieces))
            await wait_until(lambda: len(log.read_text().split()) >= 3)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        num_tokens = len(log.read_text().split())
        reply = await read(replica.answer(ask(max_new_tokens=1), False))  # the engine's only thread is free
        assert reply.completion.text == "w0"
        assert len(log.read_text().split()) <= num_tokens + 1 + 1  # the one being written, and the other's

    asyncio.run(check())


def test_a_request_that_waits_is_dropped_when_its_reader_leaves(make_replica: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def check() -> None:
        replica = make_replica(f"fake?answer={LONG}&token_s=0.002&log={log}", max_batch_size=4)
        first = replica.answer(ask("first"), True)
        assert await anext(first) == "w0"
        waiting = [
            await let_start(read(replica.answer(ask(f"{n}", max_new_tokens=2), False))) for n in range(6)
        ]
        for task in waiting[::2]:
            task.cancel()
        await first.aclose()
        replies = await asyncio.gather(*waiting[1::2])
        assert [reply.completion.text for reply in replies] == ["w0 w1"] * 3
        assert log.read_text().split() == ["first", "1", "3", "5"]  # the engine never heard of the others
        assert {reply.batch_size for reply in replies} == {3}  # nor had they a place
        assert all(task.cancelled() for task in waiting[::2])

    asyncio.run(check())


def test_a_request_joins_an_engine_that_mixes_calls_at_once(
    make_replica: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "calls_at_once", lambda engine: 8)
    log = tmp_path / "tokens"

    async def check() -> None:
        replica = make_replica(f"fake?answer={LONG}&token_s=0.002&token_log={log}")
        first = replica.answer(ask("first"), True)
        assert await anext(first) == "w0"
        others = [read(replica.answer(ask(f"{n}", max_new_tokens=3), False)) for n in range(4)]
        replies = await asyncio.gather(*others)  # the first has thousands of tokens to go
        assert {(reply.completion.text, reply.batch_size) for reply in replies} == {("w0 w1 w2", 1)}
        await first.aclose()
        num_tokens = len(log.read_text().split())
        await asyncio.sleep(0.05)
        assert len(log.read_text().split()) <= num_tokens + 1  # its slot is free

    asyncio.run(check())


def test_an_engine_that_mixes_calls_and_breaks_is_told_of(
    make_replica: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "calls_at_once", lambda engine: 8)

    def generate(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    async def check() -> None:
        replica = make_replica("fake")
        monkeypatch.setattr(replica._engine, "generate", generate)
        with pytest.raises(RuntimeError, match="broken"):
            await read(replica.answer(ask(), False))
        with pytest.raises(RuntimeError, match="broken"):
            replica.check_health()

    asyncio.run(check())


def test_a_prompt_too_long_is_refused_while_the_engine_works(make_replica: Any) -> None:
    async def check() -> None:
        replica = make_replica(f"fake?answer={LONG}&token_s=0.01&max_model_len=100")
        assert replica.max_model_len() == 100
        busy = await let_start(read(replica.answer(ask(), False)))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(5):  # a tenth of what the engine is at
            reply = await read(replica.answer(ask("word " * 200, adapter="gone"), False))
        assert not busy.done()
        assert reply.completion.error_code == "context_length_exceeded"
        busy.cancel()

    asyncio.run(check())


def test_neighbours_of_those_who_leave_are_answered_right(make_replica: Any) -> None:
    """Many come at random times and leave at random times, in line or in the middle of a batch."""
    chance = random.Random(0)

    async def visit(replica: ModelReplica, number: int) -> str | None:
        await asyncio.sleep(chance.uniform(0, 0.5))
        leaves = number % 3 != 0
        limit = 10**6 if leaves else 1 + number % 7
        reading = read(replica.answer(ask(f"{number}", max_new_tokens=limit), bool(number % 2)))
        try:
            async with asyncio.timeout(chance.uniform(0, 0.05) if leaves else None):
                return (await reading).completion.text
        except TimeoutError:
            return None

    async def check() -> None:
        replica = make_replica(f"fake?answer={LONG}&token_s=0.0002", max_batch_size=8)
        found = await asyncio.gather(*(visit(replica, number) for number in range(120)))
        for number, text in enumerate(found):
            stayed = " ".join(f"w{n}" for n in range(1 + number % 7))
            assert text == (None if number % 3 else stayed), number
        async with asyncio.timeout(30):  # those who left are dropped when their turn comes
            while not replica._waiting.empty():
                await asyncio.sleep(0.01)

    asyncio.run(check())


def test_an_adapter_that_nobody_waits_for_is_taken_out_again(
    make_replica: Any, tiny_model: Path, tiny_adapter: Path
) -> None:
    replica = make_replica(str(tiny_model), engine="transformers", adapters=f"mine={tiny_adapter}")
    engine, begun, go_on = replica._engine, threading.Event(), threading.Event()
    load_adapter = engine.load_adapter

    def load_slowly(*args: Any) -> None:
        begun.set()
        go_on.wait()
        load_adapter(*args)

    engine.load_adapter = load_slowly

    async def check() -> None:
        reading = asyncio.create_task(read(replica.answer(ask(adapter="mine"), False)))
        await wait_until(begun.is_set)
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        go_on.set()
        reply = await read(replica.answer(ask(max_new_tokens=1), False))
        assert reply.completion.error is None
        assert list(engine._adapters) == [None]

    asyncio.run(check())
    engine.close()


def test_adapters_of_several_kinds_and_the_base_are_answered_together(
    make_replica: Any, tiny_model: Path, tmp_path: Path
) -> None:
    kinds = {kind: (MIXING | APART)[kind] for kind in ("plain", "dora", "bias-all", "merger")}
    folders = {kind: build_adapter(tmp_path / kind, tiny_model, **options) for kind, options in kinds.items()}
    started = build_adapter(tmp_path / "pissa", tiny_model)
    config = (started / "adapter_config.json").read_text()
    (started / "adapter_config.json").write_text(config.replace('_weights": true', '_weights": "pissa"'))
    processor = load_processor(str(tiny_model))
    request = ask("How many?", max_new_tokens=12)
    expected: dict[str | None, list[str]] = {
        kind: answer_by_peft(tiny_model, folder, processor, [request]) for kind, folder in folders.items()
    }
    expected[None] = answer_by_peft(tiny_model, None, processor, [request])
    assert len({tuple(texts) for texts in expected.values()}) == 5
    replica = make_replica(
        str(tiny_model), engine="transformers", adapter_dir=str(tmp_path), max_batch_size=8,
        batch_wait_timeout_s=0.2,
    )  # fmt: skip

    async def answer(adapter: str | None) -> Completion:
        reply = await read(replica.answer(dataclasses.replace(request, adapter=adapter), False))
        return reply.completion

    async def check() -> None:
        for _ in range(2):
            refused, *found = await asyncio.gather(answer("pissa"), *map(answer, expected))
            assert refused.error is not None
            assert "pissa: init_lora_weights is pissa" in refused.error
            assert {kind: [each.text] for kind, each in zip(expected, found, strict=True)} == expected
        assert (await answer(None)).text == expected[None][0]

    asyncio.run(check())
    replica._engine.close()
