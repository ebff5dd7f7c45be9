"""A model on Ray Serve: requests that wait, batches, adapters.

An engine that mixes calls gets each request at once, in a thread of its own; the others get batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from vlmray.config import ServeConfig
from vlmray.engines import calls_at_once, load_engine
from vlmray.engines.base import DeadEngineError, failed_completion
from vlmray.models.source import resolve_model_id
from vlmray.schema import Completion, GenerationRequest, TokenLogprob
from vlmray.serving.adapters import AdapterCatalog
from vlmray.serving.backend import Piece, Reply

logger = logging.getLogger(__name__)

_SHARE_OF_WAITING = 0.05
"""Of the time of a batch, for clients who had an answer of the last one and ask again."""
_NUM_CHECKS = 2


class _Item:
    """One request that waits for an engine, and what it got so far; a failure of the engine ends it."""

    def __init__(self, request: GenerationRequest, stream: bool) -> None:
        self.request = request
        self.stream = stream
        self.pieces: asyncio.Queue[str | Piece | Reply | Exception] = asyncio.Queue()
        self.held = ""
        """Text that was not sent yet: a message for every token would cost more than the token."""
        self.held_logprobs: list[TokenLogprob] = []
        self.send_at = 0.0
        """When text is sent again, as `time.monotonic` tells it; the first is sent at once."""
        self.left = False
        """Whether nobody waits for the rest any more."""

    def take(self) -> str | Piece:
        """Return what was not sent yet; it is sent now."""
        piece = Piece(self.held, tuple(self.held_logprobs)) if self.held_logprobs else self.held
        self.held, self.held_logprobs = "", []
        return piece


class _Adapter:
    """An adapter in an engine: taken out once Serve has dropped it and nobody uses it any more."""

    def __init__(self, replica: ModelReplica, engine_name: str) -> None:
        self.engine_name = engine_name
        self.num_users = 0
        self._replica: ModelReplica | None = replica
        self._dropped = False

    def __enter__(self) -> _Adapter:
        self.num_users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.num_users -= 1
        self._unload_if_idle()

    def __del__(self) -> None:
        """Called by Serve too, when the adapter was not asked for longest; requests may still use it."""
        self._dropped = True
        self._unload_if_idle()

    def _unload_if_idle(self) -> None:
        if self._dropped and not self.num_users and self._replica is not None:
            self._replica.unload(self.engine_name)
            self._replica = None


def _pass_on_failure(item: _Item, call: asyncio.Future[None]) -> None:
    if not call.cancelled() and (error := call.exception()) is not None:
        item.pieces.put_nowait(error if isinstance(error, Exception) else RuntimeError(str(error)))


class ModelReplica:
    """Holds an engine and gives it batches of the requests that wait.

    Args:
        config: The server's options.
        num_threads: CPU threads of torch; None leaves torch's own choice.
        memory_fraction: Share of the GPU's memory that this replica may take.
    """

    def __init__(
        self, config: ServeConfig, num_threads: int | None = None, memory_fraction: float = 1.0
    ) -> None:
        self._catalog = AdapterCatalog(
            resolve_model_id(config.model_id), config.adapter_paths(), config.adapter_dir
        )
        has_adapters = config.adapters is not None or config.adapter_dir is not None
        self._engine: Any = load_engine(
            config.model_id,
            config,
            batch_size=config.max_batch_size,
            num_threads=num_threads,
            memory_fraction=memory_fraction,
            adapters=self._known_adapters(config),
            # One that was dropped stays while it is used, and may have been asked for again.
            max_adapters=config.max_adapters + 1 if has_adapters else 0,
        )
        num_calls = calls_at_once(config.engine)
        self._mixes_calls = num_calls > 1
        self._threads = ThreadPoolExecutor(num_calls, thread_name_prefix="engine")
        self._checks = ThreadPoolExecutor(_NUM_CHECKS, thread_name_prefix="check")
        self._num_adapters = 0
        self._failure: Exception | None = None

        async def load(name: str) -> _Adapter:
            return await self._load_adapter(name)

        self._load = serve.multiplexed(load, max_num_models_per_replica=config.max_adapters)
        self._max_batch_size = config.max_batch_size
        self._batch_wait_s = config.batch_wait_timeout_s
        self._stream_interval_s = config.stream_interval_s
        self._waiting: asyncio.Queue[_Item] = asyncio.Queue()
        self._batches: asyncio.Task[None] | None = None

    def _known_adapters(self, config: ServeConfig) -> list[str]:
        """Return the folders of adapters, those behind URIs too where they have to be verified."""
        if not config.verify_adapter:
            return self._catalog.local_folders()
        return [str(self._catalog.fetch(name)) for name in self._catalog.names()]

    async def answer(self, request: GenerationRequest, stream: bool) -> AsyncIterator[str | Piece | Reply]:
        """Yield pieces of the answer, if `stream`, and last a `Reply`.

        Cancelled or closed before its end, it ends the request: in line, or in the engine.
        """
        failed = await self._check(request)
        if failed is not None:
            yield Reply(failed, 1)
            return
        async with contextlib.AsyncExitStack() as stack:
            if request.adapter is not None:
                try:
                    adapter = stack.enter_context(await self._load(request.adapter))
                except (ValueError, OSError) as error:
                    yield Reply(failed_completion(error), 1)
                    return
                request = dataclasses.replace(request, adapter=adapter.engine_name)
            item = _Item(request, stream)
            self._begin(item)
            piece: str | Piece | Reply | Exception = ""
            try:
                while not isinstance(piece, Reply):
                    piece = await item.pieces.get()
                    if isinstance(piece, Exception):
                        raise piece
                    yield piece
            finally:
                item.left = True

    def _begin(self, item: _Item) -> None:
        """Give a request to the engine, or put it in line for its next batch."""
        if self._mixes_calls:
            loop = asyncio.get_running_loop()
            call = loop.run_in_executor(self._threads, self._run_batch, [item], loop)
            call.add_done_callback(functools.partial(_pass_on_failure, item))
            return
        if self._batches is None:  # here, as the constructor may run outside the event loop
            self._batches = asyncio.create_task(self._answer_batches())
        self._waiting.put_nowait(item)

    async def _check(self, request: GenerationRequest) -> Completion | None:
        """Refuse beside the engine's thread what can be refused: it would wait for others in vain."""
        base = dataclasses.replace(request, adapter=None)  # an adapter may not be loaded yet
        return await asyncio.get_running_loop().run_in_executor(self._checks, self._engine.check, base)

    def max_model_len(self) -> int | None:
        """Return the most tokens of a prompt and its answer."""
        limit: int | None = self._engine.max_model_len
        return limit

    def check_health(self) -> None:
        """Let Serve replace a replica whose engine broke."""
        if self._failure is not None:
            raise self._failure

    def unload(self, engine_name: str) -> None:
        """Take an adapter out of the engine, after what it does now."""
        with contextlib.suppress(RuntimeError):  # the replica is being stopped
            self._threads.submit(self._engine.unload_adapter, engine_name)

    async def _answer_batches(self) -> None:
        """Answer what waits, batch after batch.

        `serve.batch` would close a batch while the one before it is still in the engine, when few requests
        have come; here all that came meanwhile are in the next.
        """
        loop = asyncio.get_running_loop()
        last_size, last_s = 1, 0.0
        while True:
            items = await self._gather(last_size, max(self._batch_wait_s, _SHARE_OF_WAITING * last_s))
            last_size, started = len(items), time.monotonic()
            try:
                await loop.run_in_executor(self._threads, self._run_batch, items, loop)
            except Exception as error:
                for item in items:
                    item.pieces.put_nowait(error)
            last_s = time.monotonic() - started

    async def _gather(self, expected: int, patience_s: float) -> list[_Item]:
        """Wait for a request, then, with patience, for as many as expected, and for those close behind."""
        items = [await self._next()]
        patience_ends = time.monotonic() + patience_s
        while len(items) < self._max_batch_size:
            left_s = max(0.0, patience_ends - time.monotonic())
            try:
                wait_s = left_s if len(items) < expected else min(left_s, self._batch_wait_s)
                async with asyncio.timeout(wait_s):
                    items.append(await self._next())
            except TimeoutError:
                break
        return [item for item in items if not item.left]

    async def _next(self) -> _Item:
        """Wait for a request that somebody waits for."""
        while (item := await self._waiting.get()).left:
            pass
        return item

    def _run_batch(self, items: list[_Item], loop: asyncio.AbstractEventLoop) -> None:
        """Answer a batch in the engine's thread; what comes of it goes to each item's queue."""

        def put(item: _Item, piece: str | Piece | Reply) -> None:
            loop.call_soon_threadsafe(item.pieces.put_nowait, piece)

        def on_text(index: int, text: str) -> None:
            item = items[index]
            item.held += text if item.stream else ""
            now = time.monotonic()
            if item.held and now >= item.send_at:
                put(item, item.take())
                item.send_at = now + self._stream_interval_s

        def on_logprobs(index: int, logprobs: Sequence[TokenLogprob]) -> None:
            item = items[index]
            item.held_logprobs += logprobs if item.stream else ()

        def on_end(index: int, completion: Completion) -> None:
            item = items[index]
            if item.held or item.held_logprobs:
                put(item, item.take())
            put(item, Reply(completion, len(items)))

        streams = any(item.stream for item in items)
        requests = [item.request for item in items]
        try:
            self._engine.generate(
                requests,
                on_text=on_text if streams else None,
                on_end=on_end,
                cancelled=lambda index: items[index].left,
                on_logprobs=on_logprobs if streams else None,
            )
        except DeadEngineError as error:
            # Serve starts another, and whoever has no piece of an answer yet is asked there.
            logger.error("%s; the replica ends and is replaced", error)
            os._exit(1)
        except Exception as error:  # only a broken engine raises
            self._failure = error
            raise

    async def _load_adapter(self, name: str) -> _Adapter:
        self._num_adapters += 1
        # An adapter that is dropped while it is used and asked for again is in the engine twice for a while.
        engine_name = f"{name}#{self._num_adapters}"

        def load() -> None:
            self._engine.load_adapter(engine_name, str(self._catalog.fetch(name)))

        adapter = _Adapter(self, engine_name)
        # A load that has begun goes on when nobody waits for it: the adapter is dropped and taken out behind.
        await asyncio.get_running_loop().run_in_executor(self._threads, load)
        return adapter
