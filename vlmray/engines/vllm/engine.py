"""The engine over vLLM: requests stream into one running engine, whoever asks.

    generate -> worded, checked -> RunningLLM, in an asyncio loop of a thread -> tokens -> generate

vLLM holds the model in processes of its own. Tokens come back from it, not texts, so that texts and stops are
those of every engine.
"""

from __future__ import annotations

import itertools
import math
import queue
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vlmray.config import EngineConfig, ServeConfig
from vlmray.engines.base import Cancelled, DeadEngineError, OnEnd, OnLogprobs, OnText, failed_completion
from vlmray.engines.loop import BackgroundLoop
from vlmray.engines.rows import Listener, read_token
from vlmray.engines.verifying import NUM_SCORES, Scores, check_agreement, probes, score_apart
from vlmray.engines.vllm.adapters import adapter_rank, changes_base, changes_vision, check_adapter, check_room
from vlmray.engines.vllm.guard import ProcessGuard
from vlmray.engines.vllm.options import check_options, engine_args, set_environment
from vlmray.engines.vllm.requests import AsyncRow, Opener, Prepared, decode
from vlmray.engines.vllm.running import Event, RunningLLM, is_dead
from vlmray.engines.vllm.sampling import read_settings
from vlmray.engines.vllm.suitability import quantization_of
from vlmray.errors import OptionError
from vlmray.models.processors import load_processor
from vlmray.models.templates.chat import AdapterTemplates, use_template
from vlmray.schema import Completion, GenerationRequest

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

T = TypeVar("T")

_NUM_AHEAD = 32  # rows whose images are decoded before their call
_POLL_S = 0.1  # between two questions whether anybody still waits: each call asks them, beside the model
_DEAD = "vLLM's process has ended"
_PROBE = "What does the picture show? Say it in a few words."


class VLLMEngine:
    """Answers requests with vLLM; see `vlmray.engines.base.Engine` for what it promises.

    Args:
        guard: Of what was started.
        loop: A loop of its own.
        running: What was started there.
        processor: As `vlmray.models.processors.load_processor` gives it.
        max_adapters: The most that are loaded at a time.
        expected: What PEFT makes of each adapter that may be loaded; None: any may be, unverified.
        templates: Chat templates of adapters that were trained with another than the base's.
    """

    def __init__(
        self,
        guard: ProcessGuard,
        loop: BackgroundLoop,
        running: RunningLLM,
        processor: Any,
        max_adapters: int,
        expected: Mapping[str, Scores] | None = None,
        templates: AdapterTemplates | None = None,
    ) -> None:
        self.processor = processor
        self.max_model_len: int | None = running.llm.model_config.max_model_len
        self._guard, self._loop, self._running = guard, loop, running
        self._templates = AdapterTemplates() if templates is None else templates
        self._opener = Opener(processor, self._templates)
        self._adapters: dict[str | None, LoRARequest | None] = {None: None}
        self._max_adapters = max_adapters
        self._expected = expected
        self._numbers = itertools.count(1)  # threads may load beside each other

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        config: EngineConfig,
        *,
        adapter: str | None = None,
        num_threads: int | None = None,
        memory_fraction: float = 1.0,
        adapters: Sequence[str] = (),
        max_adapters: int = 0,
    ) -> VLLMEngine:
        """Start vLLM with a model; `adapter` answers the requests that name none, instead of the base.

        Args:
            model_id: Local checkpoint folder or hub id.
            config: How the model is loaded, and vLLM's options.
            adapter: Folder of a LoRA adapter, or None.
            num_threads: CPU threads of the model; None leaves vLLM's own choice.
            memory_fraction: Share of the GPU's memory that this engine may take.
            adapters: Folders of adapters that `load_adapter` will be asked for, as far as they are known.
            max_adapters: The most that will be loaded at a time.

        Raises:
            ValueError: Unusable option, model or adapter.
            FileNotFoundError: A folder that is not there or lacks files.
        """
        check_options(config)
        own = [adapter] if adapter is not None else []
        for path in own:
            check_adapter(path, model_id)
        on_gpu = torch.cuda.is_available()
        set_environment(num_threads, on_gpu=on_gpu)
        settings = read_settings(model_id, trust_remote_code=config.trust_remote_code)
        processor = load_processor(
            model_id,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
            trust_remote_code=config.trust_remote_code,
        )
        use_template(processor, config)
        max_adapters += len(own)
        known = [*adapters, *own]
        args = engine_args(
            model_id,
            config,
            on_gpu=on_gpu,
            memory_fraction=memory_fraction,
            max_adapters=max_adapters,
            max_rank=max(map(adapter_rank, known), default=0),
            adapts_vision=any(map(changes_vision, known)),
            is_quantized=quantization_of(model_id) is not None,
        )
        guard, loop = ProcessGuard(), BackgroundLoop("vllm")
        try:
            expected = score_apart(model_id, config, known) if config.verify_adapter else None
            serves = isinstance(config, ServeConfig)
            running = loop.run(RunningLLM.start(args, processor, settings, serves=serves))
        except BaseException:
            loop.close()
            guard.close()
            raise
        templates = AdapterTemplates(config)
        engine = cls(guard, loop, running, processor, max_adapters, expected, templates)
        try:
            engine._check_scores()
            for number, path in enumerate(adapters if expected is not None else ()):
                engine.load_adapter(f"verified-{number}", path)
                engine.unload_adapter(f"verified-{number}")
            if adapter is not None:
                engine._use_as_default(adapter)
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def waited_s(self) -> float:
        """Seconds in which there were requests, and none of them was ready for the model."""
        return self._running.waited_s

    def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter that requests can then ask for by name.

        Raises:
            ValueError: The name is taken, or the adapter is not one that vLLM answers exactly.
            FileNotFoundError: The folder is not there or lacks files.
        """
        if name in self._adapters:
            raise ValueError(f"an adapter named {name!r} is loaded already; known: {self._known_adapters()}")
        check_adapter(path, self._running.llm.model_config.model)
        self._adapters[name] = self._add_adapter(name, path)
        self._templates.add(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that `load_adapter` loaded, and free its memory.

        Raises:
            ValueError: There is none of that name.
        """
        adapter = self._adapters.pop(name, None)
        if adapter is None:
            raise ValueError(f"no adapter named {name!r} is loaded; known: {self._known_adapters()}")
        self._templates.pop(name, None)
        self._run(self._running.remove_adapter(adapter))

    def prepare(self, requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """Word and check requests, and begin to decode the first images."""
        prepared = Prepared(requests)
        for row in prepared.rows:
            row.completion = self._open(row)
        for row in itertools.islice((row for row in prepared.rows if row.completion is None), _NUM_AHEAD):
            row.images = self._running.decoders.submit(decode, row.request.images)
        return prepared

    def check(self, request: GenerationRequest) -> Completion | None:
        """Word and count a request; what shows only with its images is found by `generate`."""
        return self._open(AsyncRow(0, request))

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
        cancelled: Cancelled | None = None,
        on_logprobs: OnLogprobs | None = None,
    ) -> list[Completion]:
        """Answer every request, in order; those of other threads are answered beside them.

        Raises:
            DeadEngineError: vLLM's process has ended.
        """
        listener = Listener(on_text, on_end, cancelled, on_logprobs)
        prepared = requests if isinstance(requests, Prepared) else self.prepare(requests)
        assert isinstance(prepared, Prepared)
        for row in prepared.rows:
            if row.completion is not None:
                listener.end(row, row.completion)
        open_rows = [row for row in prepared.rows if row.completion is None]
        streams = on_text is not None or on_logprobs is not None or any(row.request.stop for row in open_rows)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        tasks = {row.index: self._begin(row, streams, events.put) for row in open_rows}
        try:
            self._listen(prepared.rows, tasks, listener, events)
        finally:
            for task in tasks.values():
                task.cancel()
        return [row.completion for row in prepared.rows if row.completion is not None]

    def close(self) -> None:
        """End vLLM's processes; calling it twice is harmless."""
        if not self._loop.is_closed:
            self._loop.run(self._running.stop())
            self._loop.close()
            self._guard.close()

    def _open(self, row: AsyncRow) -> Completion | None:
        """Make a row ready, or return its failure."""
        try:
            if row.request.adapter not in self._adapters:
                raise ValueError(f"unknown adapter {row.request.adapter!r}; known: {self._known_adapters()}")
            row.adapter = self._adapters[row.request.adapter]
            self._opener.open(row, self.max_model_len)
        except Exception as error:  # whatever is wrong, it is about this row
            return failed_completion(error)
        return None

    def _begin(self, row: AsyncRow, streams: bool, tell: Callable[[Event], None]) -> Future[None]:
        return self._loop.submit(self._running.answer(row, self.max_model_len, streams, tell))

    def _listen(
        self,
        rows: Sequence[AsyncRow],
        tasks: dict[int, Future[None]],
        listener: Listener,
        events: queue.SimpleQueue[Event],
    ) -> None:
        """Take what comes of open rows until none is left."""
        left = set(tasks)
        wait_s = None if listener.cancelled is None else _POLL_S
        ask_at = 0.0
        while left:
            ended: set[int] = set()
            try:
                event = events.get(timeout=wait_s)
                if event.index in left and _read(rows, event, listener):
                    ended.add(event.index)
            except queue.Empty:
                pass
            if wait_s is not None and time.monotonic() >= ask_at:
                ended |= {index for index in left - ended if listener.end_if_cancelled(rows[index])}
                ask_at = time.monotonic() + wait_s
            for index in ended:
                tasks[index].cancel()
            left -= ended

    def _use_as_default(self, path: str) -> None:
        """Let an adapter answer what names none."""
        self._adapters[None] = self._add_adapter("default", path)
        self._templates.add(None, path)

    def _check_scores(self) -> None:
        """Refuse a model whose scores are no numbers: vLLM would answer it with the first token of all."""
        found = [score for place in self._score(None) for score in place.values()]
        if not all(map(math.isfinite, found)):
            problem = "gives scores that are not finite (NaN or infinity)"
            raise OptionError(
                "model_id", problem, "look for such values in its weights, or try --dtype float32"
            )

    def _add_adapter(self, name: str, path: str) -> LoRARequest:
        """Load an adapter, and see that it changes what the base says."""
        from vllm.lora.request import LoRARequest

        room = self._running.llm.vllm_config.lora_config
        check_room(
            path,
            room.max_lora_rank if room is not None else None,
            adapts_vision=room is not None and room.enable_tower_connector_lora,
        )
        if sum(each is not None for each in self._adapters.values()) >= self._max_adapters:
            raise ValueError(
                f"vLLM was started for at most {self._max_adapters} adapters at a time; drop one"
            )
        number = next(self._numbers)
        adapter = LoRARequest(f"{name}-{number}", number, str(Path(path).expanduser().absolute()))
        self._run(self._running.add_adapter(adapter))
        try:
            if changes_base(path) and self._score(None, path) == self._score(adapter, path):
                raise OptionError("adapter", f"{path} changes nothing in vLLM", "use --engine transformers")
            self._verify(path, adapter)
        except BaseException:
            self._run(self._running.remove_adapter(adapter))
            raise
        return adapter

    def _verify(self, path: str, adapter: LoRARequest) -> None:
        """Refuse an adapter that is answered otherwise than by PEFT, or of which that is not known."""
        if self._expected is None:
            return
        if path not in self._expected:
            problem = f"compares adapters when vLLM starts, and {path} came later"
            raise OptionError("verify_adapter", problem, "start again, or leave it out")
        base, adapted = ([self._score_probe(each, with_) for each in probes()] for with_ in (None, adapter))
        dtype = self._running.llm.model_config.dtype
        check_agreement(path, self._expected[path], Scores(base, adapted), dtype)

    def _score_probe(self, request: GenerationRequest, adapter: LoRARequest | None) -> dict[int, float]:
        row = AsyncRow(0, request, adapter=adapter)
        self._opener.open(row, self.max_model_len)
        return self._run(self._running.score_first(row, NUM_SCORES))

    def _score(self, adapter: LoRARequest | None, path: str | None = None) -> list[dict[int, float]]:
        """Score a text, or a picture where an adapter may change nothing else."""
        if path is not None and changes_vision(path):
            return [self._score_probe(request, adapter) for request in probes() if request.images]
        return self._run(self._running.score(_PROBE, adapter))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._loop.run(work)
        except Exception as error:
            if is_dead(error):
                raise DeadEngineError(_DEAD) from error
            raise

    def _known_adapters(self) -> str:
        return ", ".join(sorted(name for name in self._adapters if name is not None)) or "none"


def _read(rows: Sequence[AsyncRow], event: Event, listener: Listener) -> bool:
    """Read what came of a row, and tell whether it has ended."""
    row = rows[event.index]
    if event.error is not None and is_dead(event.error):
        raise DeadEngineError(_DEAD) from event.error
    if event.error is not None:
        listener.end(row, failed_completion(_cause(event.error), prompt=row.prompt))
        return True
    for token_id, logprob in itertools.zip_longest(event.token_ids, event.logprobs):
        if read_token(rows, listener, row.index, token_id, logprob):
            return True
    if event.ended:
        listener.end(row, row.complete("length"))
    return event.ended


def _cause(error: BaseException) -> Exception:
    """Return what an error of vLLM's began with: what it wraps it in names no reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, Exception) else RuntimeError(str(error))
