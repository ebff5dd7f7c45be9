"""The engine over `transformers`: exact, batched, and at home on any device.

    requests -> prompts -> longest first -> batches -> encode ahead -> prefill, generate -> completions

Each row is encoded alone (so a bad one is found alone), on threads that work one batch ahead of the model,
and rows meet only in the padded tensors of their batch. Encoded images are decoded on these threads too.
Rows that begin alike, with the same images after the same system prompt, are kept together: what they begin
with is encoded once and goes through the model once, and its keys and values are copied for each of them.
It covers decoder-only image-text-to-text models; video and audio it does not.

Shapes: `T` tokens of a row, `P` patches or images of it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

import torch
from PIL.Image import Image

from vlmray.config import EngineConfig
from vlmray.engines.base import (
    Cancelled,
    OnEnd,
    OnLogprobs,
    OnText,
    check_request,
    failed_completion,
    limit_answer,
)
from vlmray.engines.rows import Listener
from vlmray.engines.transformers.attention import pack_attention
from vlmray.engines.transformers.batching import Batcher, count_visual_tokens
from vlmray.engines.transformers.forward import Forward
from vlmray.engines.transformers.in_flight import Heads, InFlight, Prepared
from vlmray.engines.transformers.linear import use_faster_kernels
from vlmray.engines.transformers.memory import (
    cached_share,
    empty_cache,
    find_batch_tokens,
    is_broken_device,
    is_out_of_memory,
    keep_freed_memory,
    limit_memory,
)
from vlmray.engines.verifying import Scores, TokenScores, check_agreement, likeliest, probes, score_by_peft
from vlmray.errors import OptionError
from vlmray.images.decoding import decode_image
from vlmray.models.adapters import Adapter, load_adapter
from vlmray.models.checks import check_adapter_folder
from vlmray.models.families import family_of
from vlmray.models.inputs import row_signature
from vlmray.models.loading import find_max_model_len, load_checkpoint
from vlmray.models.prompts import ChatPrompts
from vlmray.models.templates.chat import AdapterTemplates
from vlmray.schema import Completion, GenerationRequest

_NUM_ENCODERS = 2  # threads; resizing in PIL and numpy releases the interpreter lock


class TransformersEngine:
    """Answers requests with a transformers model; see `vlmray.engines.base.Engine` for what it promises.

    A batch that does not fit into memory is halved and tried again, and the size that failed is
    remembered in tokens, so that later batches of long rows are smaller while those of short rows are not.

    Args:
        model: An image-text-to-text model in eval mode, or a `PeftModel` around one, whose active adapter
            then answers everything.
        processor: Its processor, as `vlmray.models.processors.load_processor` gives it.
        batch_size: Most rows in one forward pass.
        max_batch_tokens: Most prompt tokens in one forward pass, padding included; a longer row goes alone.
            A beginning that rows share counts once, and for each of the others what its copy takes.
            None: what the memory holds (see `vlmray.engines.transformers.memory`).
        verifies: Whether each adapter that is loaded is compared with what PEFT makes of it.
        templates: Chat templates of adapters that were trained with another than the base's.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int = 16,
        max_batch_tokens: int | None = None,
        verifies: bool = False,
        templates: AdapterTemplates | None = None,
    ) -> None:
        if batch_size < 1:
            raise OptionError("batch_size", f"must be at least 1, got {batch_size}")
        self.processor = processor
        self.prompts = ChatPrompts(processor)
        self.waited_s = 0.0
        self._family = family_of(model.config)
        self.forward = Forward(model, processor, self._family)
        self.max_model_len = find_max_model_len(model.config)
        share = cached_share(model.config) if self.forward.copies_rows else 1.0
        self.batcher = Batcher(batch_size, max_batch_tokens or find_batch_tokens(model), share)
        self._adapters: dict[str | None, Adapter | None] = {None: None}
        self._verifies = verifies
        self._templates = AdapterTemplates() if templates is None else templates
        self._encoders = ThreadPoolExecutor(_NUM_ENCODERS, thread_name_prefix="encode")
        # Questions on one image are of like length, so they come close together.
        self._decode = functools.lru_cache(maxsize=8)(decode_image)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        config: EngineConfig,
        *,
        adapter: str | None = None,
        batch_size: int = 16,
        num_threads: int | None = None,
        memory_fraction: float = 1.0,
        adapters: Sequence[str] = (),
    ) -> TransformersEngine:
        """Load a model and wrap it; `adapter` answers the requests that name none, instead of the base.

        On a CPU this process keeps the memory that it frees, from then on.

        Args:
            model_id: Local checkpoint folder or hub id.
            config: How the model is loaded, and the most tokens in one forward pass.
            adapter: Folder of a LoRA adapter, or None.
            batch_size: Most rows in one forward pass.
            num_threads: CPU threads of torch in this process; None leaves torch's own choice.
            memory_fraction: Share of the GPU's memory that this process may take, from then on.
            adapters: Folders of adapters that `load_adapter` will be asked for, as far as they are known.

        Raises:
            ValueError: Unusable option, model or adapter.
            FileNotFoundError: A folder that is not there or lacks files.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        limit_memory(memory_fraction)
        if adapter is not None:
            check_adapter_folder(adapter, model_id)
        model, processor = load_checkpoint(model_id, config)
        pack_attention(model)
        if model.device.type == "cpu":
            keep_freed_memory()
            use_faster_kernels(model)
        max_batch_tokens = config.max_batch_tokens or find_batch_tokens(model, memory_fraction)
        engine = cls(
            model,
            processor,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens,
            verifies=config.verify_adapter,
            templates=AdapterTemplates(config),
        )
        for path in adapters if config.verify_adapter else ():
            engine._load(path)
        if adapter is not None:
            engine._use_as_default(adapter)
        return engine

    @property
    def model(self) -> Any:
        """The model, bare of the adapters that were loaded; None once the engine is closed."""
        return self.forward.model

    def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter that requests can then ask for by name.

        Raises:
            ValueError: The name is taken, or the adapter does not fit the model.
            FileNotFoundError: The folder is not there or lacks files.
        """
        if name in self._adapters:
            raise ValueError(f"an adapter named {name!r} is loaded already; known: {self._known_adapters()}")
        check_adapter_folder(path, self.model.config.name_or_path)
        self._adapters[name] = self._load(path)
        self._templates.add(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that `load_adapter` loaded, and free its memory.

        Raises:
            ValueError: There is none of that name.
        """
        if self._adapters.pop(name, None) is None:
            raise ValueError(f"no adapter named {name!r} is loaded; known: {self._known_adapters()}")
        self._templates.pop(name, None)

    def prepare(self, requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """Word requests, put them in order, and begin to encode the first batch."""
        prepared = Prepared(requests)
        good: list[InFlight] = []
        for row in prepared.rows:
            try:
                self._open(row)
            except Exception as error:
                row.completion = failed_completion(error)
            else:
                good.append(row)
        self.batcher.sort(good)
        prepared.queue.extend(good)
        if good:
            self._start_encoding(self.batcher.take(prepared.queue.copy()), prepared.heads)
        return prepared

    def check(self, request: GenerationRequest) -> Completion | None:
        """Word and count a request; what shows only with its images is found by `generate`."""
        try:
            self._open(InFlight(0, request))
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
        on_logprobs: OnLogprobs | None = None,
    ) -> list[Completion]:
        """Answer every request, in order, and end those that are `cancelled` between two tokens.

        The rows of a forward pass leave it together or, where they can, when half of them have ended; the
        next begin when all have.
        """
        listener = Listener(on_text, on_end, cancelled, on_logprobs)
        with self._model_waits():
            prepared = requests if isinstance(requests, Prepared) else self.prepare(requests)
            assert isinstance(prepared, Prepared)
        for row in prepared.rows:
            if row.completion is not None:
                listener.end(row, row.completion)
        self._answer(prepared.queue, prepared.heads, listener)
        return [row.completion for row in prepared.rows if row.completion is not None]

    def close(self) -> None:
        """Free the model's memory; calling it twice is harmless."""
        self._encoders.shutdown(cancel_futures=True)
        self.forward.model = None
        empty_cache()

    def _use_as_default(self, path: str) -> None:
        """Let an adapter answer what names none."""
        self._adapters[None] = self._load(path)
        self._templates.add(None, path)

    def _load(self, path: str) -> Adapter:
        """Load an adapter; where adapters are verified, refuse one that answers otherwise than by PEFT."""
        adapter = load_adapter(self.model, path)
        if self._verifies:
            pairs = [self._score(request, [None, adapter]) for request in probes()]
            base, adapted = zip(*pairs, strict=True)
            plain = score_by_peft(self.model, self.processor, path)
            check_agreement(path, plain, Scores(base, adapted), self.model.dtype)
        return adapter

    def _score(self, request: GenerationRequest, adapters: Sequence[Adapter | None]) -> list[TokenScores]:
        """Score a request with some adapters, which share a forward pass where they may."""
        groups: dict[int, list[InFlight]] = {}
        for adapter in adapters:
            row = InFlight(0, request, adapter=adapter)
            self._open(row)
            groups.setdefault(row.group, []).append(row)
        rows = [row for group in groups.values() for row in group]
        self._start_encoding(rows, {})
        for row in rows:
            row.num_prompt_tokens, row.max_new_tokens = row.num_tokens, 1
        return [likeliest(each) for group in groups.values() for each in self.forward.score(group)]

    def _open(self, row: InFlight) -> None:
        """Check a request and format its prompt; whatever is wrong with it is raised."""
        request = row.request
        check_request(request)
        if request.adapter not in self._adapters:
            raise ValueError(f"unknown adapter {request.adapter!r}; known: {self._known_adapters()}")
        if request.form is not None:
            self.forward.grammars.check(request.form)
        template = self._templates.get(request.adapter)
        prompt = self.prompts.render_request(request, template)
        row.prompt, row.tail = self.prompts.readable(prompt), prompt
        row.num_tokens = len(self.prompts.tokenize(prompt))
        limit_answer(request, row.num_tokens, self.max_model_len)  # before its images are encoded
        row.num_tokens += sum(count_visual_tokens(self.processor, image) for image in request.images)
        row.adapter = row.adapter or self._adapters[request.adapter]
        if self.forward.copies_rows and request.images:
            head, token, row.tail = prompt.rpartition(self.processor.image_token)
            images = (image if isinstance(image, bytes) else id(image) for image in request.images)
            row.head = (row.adapter, head + token, *images)
            row.num_tail_tokens = len(self.prompts.tokenize(row.tail, continues=True))

    def _answer(self, queue: deque[InFlight], heads: Heads, listener: Listener) -> None:
        """Answer rows batch by batch; the rows behind are encoded meanwhile."""
        while queue:
            batch = self.batcher.take(queue)
            near = [*batch, *islice(queue, self.batcher.batch_size)]
            heads = {row.head: heads[row.head] for row in near if row.head in heads}
            self._start_encoding(near, heads)
            with self._model_waits():
                wait({part for row in batch for part in (row.encoded_head, row.encoded) if part is not None})
            ready: dict[Any, list[InFlight]] = {}
            for row in batch:
                if listener.end_if_cancelled(row):
                    continue
                try:
                    row.num_prompt_tokens = sum(segment["input_ids"].shape[1] for segment in row.segments)
                    row.max_new_tokens = limit_answer(row.request, row.num_prompt_tokens, self.max_model_len)
                    signatures = tuple(row_signature(part, self._family.layout) for part in row.segments)
                    ready.setdefault((signatures, row.group), []).append(row)
                except Exception as error:  # whatever a processor raises, it is about this row
                    listener.end(row, failed_completion(error, prompt=row.prompt))
            for rows in ready.values():
                self._run_or_halve(rows, listener)

    @contextlib.contextmanager
    def _model_waits(self) -> Iterator[None]:
        """Count the time in which the model has nothing to work on yet."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - started

    def _start_encoding(self, rows: Sequence[InFlight], heads: Heads) -> None:
        """Encode rows on the threads; what several begin with, once."""
        for row in rows:
            if row.encoded is not None:
                continue
            if row.head is not None:
                if row.head not in heads:
                    heads[row.head] = self._encoders.submit(self._encode, row.head[1], row.request.images)
                row.encoded_head = heads[row.head]
            if row.head is None:
                row.encoded = self._encoders.submit(self._encode, row.tail, row.request.images)
            else:
                row.encoded = self._encoders.submit(self.prompts.encode_behind_image, row.tail)

    def _encode(self, text: str, images: Sequence[Image | bytes]) -> dict[str, torch.Tensor]:
        """Turn a text and its images into tensors; token-wise ones are (1, T), pixels are (P, ...)."""
        decoded = [self._decode(image) if isinstance(image, bytes) else image for image in images]
        return self.prompts.encode(text, decoded)

    def _run_or_halve(self, rows: list[InFlight], listener: Listener) -> None:
        """Generate for a batch; if that fails, for its halves; a row that fails alone is an error."""
        try:
            self.forward.run(rows, listener)
            return
        except Exception as error:  # of a family nobody has met it may be any, and about one of the rows
            if is_broken_device(error):
                raise
            out_of_memory = is_out_of_memory(error)
            reason = None if out_of_memory else failed_completion(error, prompt=rows[0].prompt)
        # Past the except block the traceback, and with it the tensors of the failed pass, is gone.
        empty_cache()
        left = [row for row in rows if row.completion is None]
        if len(rows) == 1:
            for row in left:
                listener.end(row, reason or self._too_large(row))
            return
        if out_of_memory:
            self.batcher.remember_failure(rows)
        half = -(-len(left) // 2)
        for part in (left[:half], left[half:]):
            if part:
                self._run_or_halve(part, listener)

    def _too_large(self, row: InFlight) -> Completion:
        message = (
            f"out of memory with this row alone ({row.num_tokens} tokens and an answer); "
            "lower --max_pixels or --max_new_tokens"
        )
        return failed_completion(MemoryError(message), prompt=row.prompt)

    def _known_adapters(self) -> str:
        return ", ".join(sorted(name for name in self._adapters if name is not None)) or "none"
