"""The engine over vLLM: requests stream into one running engine, whoever asks.

    generate -> worded, checked -> images decoded -> vLLM's processor -> AsyncLLM -> tokens -> generate

vLLM holds the model in processes of its own; what is here runs in an asyncio loop of a thread, and in the
threads that call `generate`. Prompts go to vLLM as tokens with one placeholder an image, so that it reads no
special token in what people wrote, and tokens come back, so that texts and stops are those of every engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL.Image import Image
from vllm import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from vlmray.config import EngineConfig
from vlmray.engines.base import (
    Cancelled,
    DeadEngineError,
    OnEnd,
    OnText,
    check_request,
    failed_completion,
    limit_answer,
)
from vlmray.engines.rows import Listener, Row, read_token
from vlmray.engines.streamed_text import Answer
from vlmray.engines.transformers.batching import count_visual_tokens
from vlmray.engines.vllm.loop import BackgroundLoop
from vlmray.engines.vllm.options import check_options, engine_args, set_environment
from vlmray.engines.vllm.sampling import read_settings, row_end_ids, sampling_params
from vlmray.images.decoding import decode_image
from vlmray.models.processors import load_processor
from vlmray.models.prompts import ChatPrompts, template_options
from vlmray.schema import Completion, GenerationRequest

_NUM_DECODERS = 2  # threads; decoding in PIL releases the interpreter lock
_NUM_AHEAD = 32  # rows whose images are decoded before their call
_POLL_S = 0.02  # between two questions whether anybody still waits
_NUM_TRIES = 3  # of a row whose image vLLM's processes do not agree to have sent

Images = list[Image]


@dataclass(slots=True)
class AsyncRow(Row):
    """A request on its way through vLLM."""

    token_ids: Sequence[int] = ()
    """Its prompt, with one placeholder an image."""

    adapter: LoRARequest | None = None
    images: Future[Images] | None = None

    def free(self) -> None:
        """Let go of the images."""
        self.images = None


class Prepared(list[GenerationRequest]):
    """Requests, and how far the engine is with them."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        super().__init__(requests)
        self.rows = [AsyncRow(index, request) for index, request in enumerate(requests)]


@dataclass(frozen=True, slots=True)
class Event:
    """What the loop has to tell of a row."""

    index: int
    token_ids: Sequence[int] = ()
    ended: bool = False
    error: Exception | None = None


class VLLMEngine:
    """Answers requests with vLLM; see `vlmray.engines.base.Engine` for what it promises.

    Args:
        llm: vLLM's engine.
        loop: Where that was started.
        processor: As `vlmray.models.processors.load_processor` gives it.
        settings: The model's generation config.
    """

    def __init__(self, llm: AsyncLLM, loop: BackgroundLoop, processor: Any, settings: Any) -> None:
        self.processor = processor
        self.prompts = ChatPrompts(processor)
        self.max_model_len: int | None = llm.model_config.max_model_len
        self.waited_s = 0.0
        self._llm, self._loop, self._settings = llm, loop, settings
        self._adapters: dict[str | None, LoRARequest | None] = {None: None}
        self._num_adapters = 0
        self._decoders = ThreadPoolExecutor(_NUM_DECODERS, thread_name_prefix="decode")
        # What waits for a place in the model's batch; more would only hold pixels in memory.
        self._slots = asyncio.Semaphore(2 * llm.vllm_config.scheduler_config.max_num_seqs)
        self._num_encoding = self._num_running = 0
        self._idle_since: float | None = None
        _use_image_processor(llm, processor)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        config: EngineConfig,
        *,
        adapter: str | None = None,
        num_threads: int | None = None,
        memory_fraction: float = 1.0,
    ) -> VLLMEngine:
        """Start vLLM with a model; `adapter` answers the requests that name none, instead of the base.

        Args:
            model_id: Local checkpoint folder or hub id.
            config: How the model is loaded, and vLLM's options.
            adapter: Folder of a LoRA adapter, or None.
            num_threads: CPU threads of the model; None leaves vLLM's own choice.
            memory_fraction: Share of the GPU's memory that this engine may take.

        Raises:
            ValueError: Unusable option, model or adapter.
            FileNotFoundError: A folder that is not there or lacks files.
        """
        check_options(config)
        on_gpu = torch.cuda.is_available()
        set_environment(num_threads, on_gpu=on_gpu)
        settings = read_settings(model_id, trust_remote_code=config.trust_remote_code)
        processor = load_processor(
            model_id,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
            trust_remote_code=config.trust_remote_code,
        )
        args = engine_args(
            model_id, config, on_gpu=on_gpu, memory_fraction=memory_fraction, max_adapters=0, max_rank=0
        )
        loop = BackgroundLoop("vllm")
        try:
            engine = cls(loop.run(_start(args)), loop, processor, settings)
        except BaseException:
            loop.close()
            raise
        return engine

    def prepare(self, requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """Word and check requests, and begin to decode the first images."""
        prepared = Prepared(requests)
        for row in prepared.rows:
            try:
                self._open(row)
            except Exception as error:  # whatever is wrong with it, it is about this row
                row.completion = failed_completion(error)
        for row in islice((row for row in prepared.rows if row.completion is None), _NUM_AHEAD):
            row.images = self._decoders.submit(_decode, row.request.images)
        return prepared

    def check(self, request: GenerationRequest) -> Completion | None:
        """Word and count a request; what shows only with its images is found by `generate`."""
        try:
            self._open(AsyncRow(0, request))
        except Exception as error:
            return failed_completion(error)
        return None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
        cancelled: Cancelled | None = None,
    ) -> list[Completion]:
        """Answer every request, in order; those of other threads are answered beside them."""
        listener = Listener(on_text, on_end, cancelled)
        prepared = requests if isinstance(requests, Prepared) else self.prepare(requests)
        assert isinstance(prepared, Prepared)
        for row in prepared.rows:
            if row.completion is not None:
                listener.end(row, row.completion)
        open_rows = [row for row in prepared.rows if row.completion is None]
        streams = on_text is not None or cancelled is not None or any(row.request.stop for row in open_rows)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        tasks = {row.index: self._loop.submit(self._answer(row, streams, events.put)) for row in open_rows}
        try:
            self._listen(prepared.rows, tasks, listener, events)
        finally:
            for task in tasks.values():
                task.cancel()
        return [row.completion for row in prepared.rows if row.completion is not None]

    def close(self) -> None:
        """End vLLM's processes; calling it twice is harmless."""
        self._decoders.shutdown(cancel_futures=True)
        self._llm.shutdown()
        self._loop.close()

    def _open(self, row: AsyncRow) -> None:
        """Check a request, and make tokens of its prompt; whatever is wrong with it is raised."""
        request = row.request
        check_request(request)
        if request.adapter not in self._adapters:
            raise ValueError(f"unknown adapter {request.adapter!r}; known: {self._known_adapters()}")
        prompt = self.prompts.render(request.messages, **template_options(self.processor, request))
        row.prompt = self.prompts.readable(prompt)
        row.token_ids = self.prompts.processor_for(prompt).tokenizer(prompt)["input_ids"]
        self._check_placeholders(row)
        num_visual = sum(count_visual_tokens(self.processor.image_processor, image) for image in request.images)
        limit_answer(request, len(row.token_ids) + num_visual - len(request.images), self.max_model_len)
        row.adapter = self._adapters[request.adapter]

    def _check_placeholders(self, row: AsyncRow) -> None:
        """Refuse a prompt whose text has placeholders of its own: it would take a neighbour's image."""
        image_id, video_id = (getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video"))
        found, expected = row.token_ids.count(image_id), len(row.request.images)
        if image_id is not None and found != expected:
            raise ValueError(f"the prompt has {found} image tokens where its images give {expected}")
        if video_id is not None and video_id in row.token_ids:
            raise ValueError("the prompt holds a video placeholder, and video is not supported")

    def _listen(
        self,
        rows: Sequence[AsyncRow],
        tasks: dict[int, Future[None]],
        listener: Listener,
        events: queue.SimpleQueue[Event],
    ) -> None:
        """Take what comes of open rows until none is left."""
        left = set(tasks)
        asked_at = 0.0
        while left:
            try:
                event = events.get(timeout=_POLL_S if listener.cancelled is not None else None)
            except queue.Empty:
                pass
            else:
                if event.index in left and self._read(rows, event, listener):
                    left.discard(event.index)
                    tasks[event.index].cancel()
            if listener.cancelled is not None and time.monotonic() - asked_at >= _POLL_S:
                gone = {index for index in left if listener.end_if_cancelled(rows[index])}
                for index in gone:
                    tasks[index].cancel()
                left -= gone
                asked_at = time.monotonic()

    def _read(self, rows: Sequence[AsyncRow], event: Event, listener: Listener) -> bool:
        """Read what came of a row, and tell whether it has ended."""
        row = rows[event.index]
        if isinstance(event.error, EngineDeadError):
            raise DeadEngineError("vLLM's process has ended") from event.error
        if event.error is not None:
            listener.end(row, failed_completion(_cause(event.error), prompt=row.prompt))
            return True
        for token_id in event.token_ids:
            if read_token(rows, listener, row.index, token_id):
                return True
        if event.ended:
            listener.end(row, row.complete("length"))
        return event.ended

    async def _answer(self, row: AsyncRow, streams: bool, tell: Callable[[Event], None]) -> None:
        """Have vLLM answer a row, and tell of its tokens."""
        try:
            async with self._slots:
                for number in range(_NUM_TRIES):
                    inputs = await self._encode(row)
                    if await self._run(row, inputs, streams, tell):
                        return
                raise RuntimeError(f"vLLM did not take the row's images {number + 1} times")
        except Exception as error:
            tell(Event(row.index, error=error))

    async def _encode(self, row: AsyncRow) -> Any:
        """Return a row as vLLM takes it, and note how long its answer may be."""
        self._count(encoding=1)
        try:
            prompt: dict[str, Any] = {"prompt_token_ids": row.token_ids}
            if row.request.images:
                row.images = row.images or self._decoders.submit(_decode, row.request.images)
                prompt["multi_modal_data"] = {"image": await asyncio.wrap_future(row.images)}
                prompt["multi_modal_uuids"] = {"image": [*map(_name, row.request.images)]}
            (inputs,) = await self._llm.renderer.render_cmpl_async([prompt])
        finally:
            self._count(encoding=-1)
        row.num_prompt_tokens = len(inputs["prompt_token_ids"])
        row.max_new_tokens = limit_answer(row.request, row.num_prompt_tokens, self.max_model_len)
        row.answer = Answer(
            self.processor.tokenizer,
            row.max_new_tokens,
            row_end_ids(row, self._settings),
            row.request.stop,
            row.request.min_new_tokens,
        )
        return inputs

    async def _run(self, row: AsyncRow, inputs: Any, streams: bool, tell: Callable[[Event], None]) -> bool:
        """Pass a row to vLLM; tell whether it could be answered."""
        params = sampling_params(row, self._settings, streams=streams)
        self._count(running=1)
        try:
            outputs = self._llm.generate(inputs, params, uuid.uuid4().hex, lora_request=row.adapter)
            async for output in outputs:
                (answer,) = output.outputs
                if answer.finish_reason == "error":
                    return False
                tell(Event(row.index, list(answer.token_ids), output.finished))
        finally:
            self._count(running=-1)
        return True

    def _count(self, *, encoding: int = 0, running: int = 0) -> None:
        """Note a row that comes or goes, and how long the model waits for the next; called in the loop."""
        now = time.perf_counter()
        if self._idle_since is not None:
            self.waited_s += now - self._idle_since
        self._num_encoding += encoding
        self._num_running += running
        self._idle_since = now if self._num_encoding and not self._num_running else None

    def _known_adapters(self) -> str:
        return ", ".join(sorted(name for name in self._adapters if name is not None)) or "none"


async def _start(args: dict[str, Any]) -> AsyncLLM:
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))


def _use_image_processor(llm: AsyncLLM, processor: Any) -> None:
    """Have vLLM's processor make of images what ours does: its own resizes by way of torchvision.

    vLLM keeps one processor for all prompts, so it has ours from now on.
    """
    info = llm.renderer.get_mm_processor().info
    info.get_hf_processor().image_processor = processor.image_processor
    if info.get_hf_processor().image_processor is not processor.image_processor:
        raise RuntimeError("this version of vLLM makes a processor for each prompt; see --engine transformers")


def _decode(images: Sequence[Image | bytes]) -> Images:
    return [decode_image(image) if isinstance(image, bytes) else image for image in images]


def _name(image: Image | bytes) -> str | None:
    """Return what vLLM knows an image by, without a look at its pixels."""
    return hashlib.blake2b(image, digest_size=16).hexdigest() if isinstance(image, bytes) else None


def _cause(error: BaseException) -> Exception:
    """Return what an error of vLLM's began with: what it wraps it in names no reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, Exception) else RuntimeError(str(error))
