"""The engine over `transformers`: exact, batched, and at home on any device.

    requests -> prompts -> longest first -> batches -> encode ahead -> prefill, generate -> completions

Each row is encoded alone (so a bad one is found alone), on threads that work one batch ahead of the model,
and rows meet only in the padded tensors of their batch. Encoded images are decoded on these threads too.
Rows that begin alike, with the same images after the same system prompt, are kept together: what they begin
with is encoded once and goes through the model once, and its keys and values are copied for each of them.
It covers decoder-only image-text-to-text models; video and audio it does not.

Shapes: `B` rows of a batch, `G` beginnings among them, `T` tokens of the longest row, `P` patches or images
of all rows.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

import torch
from PIL.Image import Image
from torch.nn.functional import pad
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import Cache

from vlmray.engines.answers import Answer
from vlmray.engines.base import OnEnd, OnText, check_request, failed_completion
from vlmray.engines.transformers.attention import pack_attention
from vlmray.engines.transformers.cache import make_cache
from vlmray.engines.transformers.in_flight import Heads, InFlight, Listener, Prepared, end_ids, read_token
from vlmray.engines.transformers.linear import use_faster_kernels
from vlmray.engines.transformers.memory import (
    cached_share,
    empty_cache,
    find_batch_tokens,
    is_out_of_memory,
    keep_freed_memory,
    limit_memory,
)
from vlmray.engines.transformers.sampling import RowwiseLogitsProcessor, RowwiseStoppingCriteria
from vlmray.images.decoding import decode_image, image_size
from vlmray.models.adapters import adapts_language_alone, attach_adapter, detach_adapter, is_peft_model
from vlmray.models.checks import check_adapter_folder
from vlmray.models.inputs import encode_text, join_rows, row_signature
from vlmray.models.loading import load_qwen_vl_model_and_processor
from vlmray.models.vision import encode_images, replace_pixels
from vlmray.schema import Completion, GenerationRequest

_NUM_ENCODERS = 2  # threads; resizing in PIL and numpy releases the interpreter lock
_COPIES_ROWS = ("qwen2_5_vl",)
"""Model types for which copied and selected rows of the cache are known to give the answers of whole rows
(see the tests)."""

_FULL = "full_attention"  # what the cache is made for
_ROOM = 64  # answer tokens that the cache has room for, before it has to be copied
_PIXELS_PER_TOKEN = 28 * 28  # a guess for ordering rows, where the image processor does not tell


class TransformersEngine:
    """Answers requests with a transformers model; see `vlmray.engines.base.Engine` for what it promises.

    A batch that does not fit into memory is halved and tried again, and the size that failed is
    remembered in tokens, so that later batches of long rows are smaller while those of short rows are not.

    Args:
        model: An image-text-to-text model in eval mode, or a `PeftModel` around one.
        processor: Its processor, as `vlmray.models.processors.load_processor` gives it.
        batch_size: Most rows in one forward pass.
        max_batch_tokens: Most prompt tokens in one forward pass, padding included; a longer row goes alone.
            A beginning that rows share counts once, and for each of the others what its copy takes.
            None: what the memory holds (see `vlmray.engines.transformers.memory`).
        default_adapter: PEFT name of an adapter that `model` has and that answers the requests which
            name none; None answers those with the base. With a default the base cannot be asked.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch_size: int = 16,
        max_batch_tokens: int | None = None,
        default_adapter: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {batch_size}")
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.waited_s = 0.0
        self._adapters: dict[str | None, str | None] = {None: default_adapter}
        self._num_loaded = 0
        self._may_mix = True
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [_FULL])
        self._copies_rows = model.config.model_type in _COPIES_ROWS and kinds == {_FULL}
        self.max_batch_tokens = max_batch_tokens or find_batch_tokens(model)
        self._cached_share = cached_share(model.config) if self._copies_rows else 1.0
        self._encoders = ThreadPoolExecutor(_NUM_ENCODERS, thread_name_prefix="encode")
        # Questions on one image are of like length, so they come close together.
        self._decode = functools.lru_cache(maxsize=8)(decode_image)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        *,
        adapter: str | None = None,
        batch_size: int = 16,
        max_batch_tokens: int | None = None,
        num_threads: int | None = None,
        memory_fraction: float = 1.0,
        **options: Any,
    ) -> TransformersEngine:
        """Load a model and wrap it; `adapter` becomes the default adapter.

        On a CPU this process keeps the memory that it frees, from then on.

        Args:
            model_id: Local checkpoint folder or hub id.
            adapter: Folder of a LoRA adapter, or None.
            batch_size: Most rows in one forward pass.
            max_batch_tokens: Most prompt tokens in one; None: what the memory holds.
            num_threads: CPU threads of torch in this process; None leaves torch's own choice.
            memory_fraction: Share of the GPU's memory that this process may take, from then on.
            **options: Passed to `vlmray.models.loading.load_qwen_vl_model_and_processor`, which checks them.

        Raises:
            ValueError: Unusable option, model or adapter.
            FileNotFoundError: A folder that is not there or lacks files.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        limit_memory(memory_fraction)
        model, processor = load_qwen_vl_model_and_processor(model_id, adapter=adapter, **options)
        pack_attention(model)
        if model.device.type == "cpu":
            keep_freed_memory()
            use_faster_kernels(model)
        return cls(
            model,
            processor,
            batch_size=batch_size,
            max_batch_tokens=max_batch_tokens or find_batch_tokens(model, memory_fraction),
            default_adapter=adapter and "default",
        )

    def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter that requests can then ask for by name.

        Raises:
            ValueError: The name is taken, or the adapter does not fit the model.
            FileNotFoundError: The folder is not there or lacks files.
        """
        if name in self._adapters:
            raise ValueError(f"an adapter named {name!r} is loaded already; known: {self._known_adapters()}")
        check_adapter_folder(path, self.model.config.name_or_path)
        internal = f"loaded_{self._num_loaded}"  # PEFT makes module names of it, which allow no dots
        self.model = attach_adapter(self.model, path, name=internal)
        self._adapters[name] = internal
        self._num_loaded += 1
        # PEFT applies each adapter to its rows of a batch; a vision tower sees patches instead of rows.
        self._may_mix = self._may_mix and adapts_language_alone(self.model)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that `load_adapter` loaded, and free its memory.

        Raises:
            ValueError: There is none of that name.
        """
        internal = self._adapters.pop(name, None)
        if internal is None:
            raise ValueError(f"no adapter named {name!r} is loaded; known: {self._known_adapters()}")
        self.model = detach_adapter(self.model, internal)

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
        self._sort(good)
        prepared.queue.extend(good)
        if good:
            self._start_encoding(self._take_batch(prepared.queue.copy()), prepared.heads)
        return prepared

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
    ) -> list[Completion]:
        """Answer every request, in order; tell `on_text` and `on_end` of what there is as soon as it is."""
        listener = Listener(on_text, on_end)
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
        self.model = None
        empty_cache()

    def _open(self, row: InFlight) -> None:
        """Check a request and format its prompt; whatever is wrong with it is raised."""
        request = row.request
        check_request(request)
        if request.adapter not in self._adapters:
            raise ValueError(f"unknown adapter {request.adapter!r}; known: {self._known_adapters()}")
        messages = [dict(message) for message in request.messages]  # the template call rewrites some parts
        row.prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        row.num_tokens = len(self.processor.tokenizer(row.prompt)["input_ids"])
        row.num_tokens += sum(self._count_visual_tokens(image) for image in request.images)

        if self._copies_rows and request.images:
            head, token, row.tail = row.prompt.rpartition(self.processor.image_token)
            images = (image if isinstance(image, bytes) else id(image) for image in request.images)
            row.head = (self._adapters[request.adapter], head + token, *images)
            row.num_tail_tokens = len(self.processor.tokenizer(row.tail)["input_ids"])

    def _sort(self, rows: list[InFlight]) -> None:
        """Put the longest first, next to those with the same beginning.

        The largest batch comes while memory is least fragmented, and fails early.
        """
        first: dict[Any, InFlight] = {}  # the longest of each beginning
        for row in sorted(rows, key=lambda row: -row.num_tokens):
            first.setdefault(row.head or row.index, row)

        def place(row: InFlight) -> tuple[str, int, int, int]:
            leader = first[row.head or row.index]
            return self._group(row), -leader.num_tokens, leader.index, -row.num_tokens

        rows.sort(key=place)

    def _count_visual_tokens(self, image: Image | bytes) -> int:
        width, height = image_size(image)
        image_processor = self.processor.image_processor
        if not hasattr(image_processor, "merge_size"):
            return max(1, width * height // _PIXELS_PER_TOKEN)
        patches = image_processor.get_number_of_image_patches(height, width, {})
        return int(patches) // image_processor.merge_size**2

    def _answer(self, queue: deque[InFlight], heads: Heads, listener: Listener) -> None:
        """Answer rows batch by batch; the rows behind are encoded meanwhile."""
        while queue:
            batch = self._take_batch(queue)
            near = [*batch, *islice(queue, self.batch_size)]
            heads = {row.head: heads[row.head] for row in near if row.head in heads}
            self._start_encoding(near, heads)
            with self._model_waits():
                wait({part for row in batch for part in (row.encoded_head, row.encoded) if part is not None})
            ready: dict[Any, list[InFlight]] = {}
            for row in batch:
                try:
                    signatures = tuple(map(row_signature, row.segments))
                    ready.setdefault((signatures, self._group(row)), []).append(row)
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

    def _take_batch(self, queue: deque[InFlight]) -> list[InFlight]:
        """Pop the next rows: at least one, as many as rows and tokens of a batch allow."""
        batch = [queue.popleft()]
        while queue and len(batch) < self.batch_size:
            if self._count_tokens([*batch, queue[0]]) > self.max_batch_tokens:
                break
            batch.append(queue.popleft())
        return batch

    def _count_tokens(self, rows: Sequence[InFlight]) -> int:
        """Count the prompt tokens of a batch, padding included; copies of a beginning by what they take."""
        longest = max(row.num_tokens for row in rows)
        num_first = len({row.head for row in rows}) if self._has_common_heads(rows) else len(rows)
        copy = self._cached_share * longest + max(row.num_tail_tokens for row in rows)
        return longest * num_first + int(copy * (len(rows) - num_first))

    def _start_encoding(self, rows: Sequence[InFlight], heads: Heads) -> None:
        """Encode rows on the threads; what several begin with, once."""
        for row in rows:
            if row.encoded is not None:
                continue
            if row.head is None:
                row.encoded = self._encoders.submit(self._encode, row.prompt, row.request.images)
                continue
            if row.head not in heads:
                heads[row.head] = self._encoders.submit(self._encode, row.head[1], row.request.images)
            row.encoded_head = heads[row.head]
            row.encoded = self._encoders.submit(self._encode, row.tail, ())

    def _encode(self, text: str, images: Sequence[Image | bytes]) -> dict[str, torch.Tensor]:
        """Turn a text and its images into tensors; token-wise ones are (1, T), pixels are (P, ...)."""
        decoded = [self._decode(image) if isinstance(image, bytes) else image for image in images]
        return encode_text(self.processor, text, decoded)

    def _run_or_halve(self, rows: list[InFlight], listener: Listener) -> None:
        """Generate for a batch; out of memory, for its halves; a single row that does not fit fails."""
        try:
            self._run(rows, listener)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # Past the except block the traceback, and with it the tensors of the failed pass, is gone.
        empty_cache()
        longest = max(row.num_tokens for row in rows)
        if len(rows) == 1:
            message = (
                f"out of memory with this row alone ({longest} tokens and an answer); "
                "lower --max_pixels or --max_new_tokens"
            )
            listener.end(rows[0], failed_completion(MemoryError(message), prompt=rows[0].prompt))
            return
        self.max_batch_tokens = min(self.max_batch_tokens, self._count_tokens(rows) // 2)
        left = [row for row in rows if row.completion is None]
        half = -(-len(left) // 2)
        for part in (left[:half], left[half:]):
            if part:
                self._run_or_halve(part, listener)

    def _run(self, rows: list[InFlight], listener: Listener) -> None:
        """Generate for rows that share a forward pass; those that have ended leave it."""
        config = copy.deepcopy(self.model.generation_config)
        penalty = config.repetition_penalty or 1.0
        # Sampling and the penalty are ours (see RowwiseLogitsProcessor). These are what transformers
        # takes for "unset", where a value would make it warn that greedy ignores it.
        config.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0)
        ends = end_ids(config)
        for row in rows:
            row.num_prompt_tokens = sum(segment["input_ids"].shape[1] for segment in row.segments)
            row.answer = Answer(self.processor.tokenizer, row.request.max_new_tokens, ends, row.request.stop)
        with torch.inference_mode():
            inputs = self._begin(rows)
            while rows:
                self._generate_some(rows, inputs, config, penalty, listener)
                left = [place for place, row in enumerate(rows) if row.completion is None]
                rows = [rows[place] for place in left]
                self._select(inputs, left)

    def _generate_some(
        self, rows: list[InFlight], inputs: dict[str, Any], config: Any, penalty: float, listener: Listener
    ) -> None:
        """Generate until half the rows have ended, or all where none can leave; update the inputs."""
        answers = [row.answer for row in rows if row.answer is not None]
        config.max_new_tokens = max(
            row.request.max_new_tokens - answer.num_tokens for row, answer in zip(rows, answers, strict=True)
        )
        mask = inputs["attention_mask"]
        choose = RowwiseLogitsProcessor(
            [row.request for row in rows], mask, penalty, [answer.num_tokens for answer in answers]
        )
        stop = RowwiseStoppingCriteria(
            len(rows),
            functools.partial(read_token, rows, listener),
            num_to_end=-(-len(rows) // 2) if "past_key_values" in inputs else len(rows),
        )
        with self._use_adapters(rows) as options:
            ids = self.model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([stop]),
                **options,
            )
        inputs["input_ids"] = ids
        inputs["attention_mask"] = pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)

    def _select(self, inputs: dict[str, Any], places: list[int]) -> None:
        """Keep some rows of what `generate` goes on from."""
        if not places:
            return
        kept = torch.tensor(places, device=self.model.device)
        cache = inputs["past_key_values"]
        cache.batch_select_indices(kept)
        inner = self._base.model
        inner.rope_deltas = inner.rope_deltas[kept]
        ids, mask = inputs["input_ids"][kept], inputs["attention_mask"][kept]
        inputs.clear()  # pixels are in the cache by now
        inputs.update(input_ids=ids, attention_mask=mask, past_key_values=cache)

    def _begin(self, rows: list[InFlight]) -> dict[str, Any]:
        """Return what `generate` starts from."""
        if not self._copies_rows:
            return self._join(rows)
        longest = max(row.tail_inputs["input_ids"].shape[1] for row in rows)
        cache = make_cache(longest + min(_ROOM, max(row.request.max_new_tokens for row in rows)))
        if not self._has_common_heads(rows):
            with self._use_adapters(rows):
                return {**self._encode_images(self._join(rows)), "past_key_values": cache}
        return self._prefill(rows, cache)

    def _join(
        self, rows: list[InFlight], part: Callable[[InFlight], Any] = lambda row: row.inputs
    ) -> dict[str, Any]:
        """Pad rows, or a part of each, on the left, and put them on the model's device."""
        pad_id = self.processor.tokenizer.pad_token_id
        inputs = join_rows([part(row) for row in rows], pad_id=pad_id, side="left")
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    def _encode_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run images through the tower, a few at a time: a batch of many would take far more memory."""
        if "pixel_values" not in inputs:
            return inputs
        features = encode_images(self._base, inputs["pixel_values"], inputs["image_grid_thw"])
        return replace_pixels(inputs, features)

    def _has_common_heads(self, rows: Sequence[InFlight]) -> bool:
        heads = {row.head for row in rows}
        return None not in heads and len(heads) < len(rows)

    def _prefill(self, rows: list[InFlight], cache: Cache) -> dict[str, Any]:
        """Run what rows begin with through the model, once each; return what `generate` goes on from.

        Every row is its beginning, padded on the left, and its rest, padded in between: attention skips
        the padding, and positions are counted without it.
        """
        leaders = list({row.head: row for row in reversed(rows)}.values())
        place = {row.head: index for index, row in enumerate(leaders)}
        heads = self._join(leaders, lambda row: row.head_inputs)
        tails = self._join(rows, lambda row: row.tail_inputs)
        with self._use_adapters(leaders) as options:
            heads = self._encode_images(heads)
            self.model(**heads, **options, past_key_values=cache, use_cache=True, logits_to_keep=1)
        inputs = {**heads, "past_key_values": cache}
        self._select(inputs, [place[row.head] for row in rows])
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.cat([inputs[name], tails[name]], dim=1)
        return inputs

    @contextlib.contextmanager
    def _use_adapters(self, rows: list[InFlight]) -> Iterator[dict[str, Any]]:
        """Let each row meet its own adapter; yield what `generate` has to be told for that."""
        adapters = [self._adapters[row.request.adapter] for row in rows]
        if not is_peft_model(self.model):
            yield {}
        elif len(set(adapters)) > 1:
            yield {"adapter_names": [adapter or "__base__" for adapter in adapters]}
        elif adapters[0] is not None:
            self.model.set_adapter(adapters[0])
            yield {}
        else:
            with self.model.disable_adapter():
                yield {}

    @property
    def _base(self) -> Any:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    def _group(self, row: InFlight) -> str:
        """Name what rows must have in common to share a forward pass, as far as adapters go."""
        return "" if self._may_mix else self._adapters[row.request.adapter] or ""

    def _known_adapters(self) -> str:
        return ", ".join(sorted(name for name in self._adapters if name is not None)) or "none"
