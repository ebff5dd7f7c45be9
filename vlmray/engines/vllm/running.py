"""vLLM's engine while it runs: what is done with it in its asyncio loop, and nowhere else.

row -> images decoded -> vLLM's processor -> AsyncLLM -> events for the thread that waits
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmray.engines.base import limit_answer
from vlmray.engines.logprobs import TokenTexts
from vlmray.engines.streamed_text import Answer
from vlmray.engines.vllm.requests import AsyncRow, decode, image_name
from vlmray.engines.vllm.sampling import row_end_ids, sampling_params
from vlmray.schema import TokenLogprob

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

_NUM_DECODERS = 2  # threads; decoding in PIL releases the interpreter lock
_NUM_TRIES = 3  # of a row whose image one of vLLM's processes takes for sent, and the other has dropped


@dataclass(frozen=True, slots=True)
class Event:
    """What there is to tell of a row."""

    index: int
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    """Of each of these tokens; none where the row does not ask for them."""

    ended: bool = False
    error: Exception | None = None


Tell = Callable[[Event], None]


def is_dead(error: Exception) -> bool:
    """Tell whether an error means that vLLM's process has ended."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


class RunningLLM:
    """A running engine of vLLM; made in the loop in which it is used.

    Args:
        llm: The engine.
        processor: As `vlmray.models.processors.load_processor` gives it.
        settings: The model's generation config.
    """

    def __init__(self, llm: AsyncLLM, processor: Any, settings: Any) -> None:
        self.llm = llm
        self.waited_s = 0.0
        self.decoders = ThreadPoolExecutor(_NUM_DECODERS, thread_name_prefix="decode")
        self._processor, self._settings = processor, settings
        self._texts = TokenTexts(processor.tokenizer)
        # What waits for a place in the model's batch; more would only hold pixels in memory.
        self._slots = asyncio.Semaphore(2 * llm.vllm_config.scheduler_config.max_num_seqs)
        self._num_encoding = self._num_running = 0
        self._idle_since: float | None = None
        self._use_image_processor()

    @classmethod
    async def start(cls, args: dict[str, Any], processor: Any, settings: Any, *, serves: bool) -> RunningLLM:
        """Start vLLM's processes, and wait until the model is loaded.

        Args:
            args: Of vLLM's engine; the rest is vLLM's choice for clients that wait, or for much at once.
            processor: As `vlmray.models.processors.load_processor` gives it.
            settings: The model's generation config.
            serves: Whether clients wait.

        Raises:
            ValueError: Options that vLLM does not take together, or not for this model.
        """
        from pydantic import ValidationError
        from vllm import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        usage = UsageContext.OPENAI_API_SERVER if serves else UsageContext.LLM_CLASS
        try:
            llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**args), True, usage)
        except ValidationError as error:  # which repeats all that it was given
            problems = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
            raise ValueError(f"vLLM refuses its options: {problems}") from error
        return cls(llm, processor, settings)

    async def answer(self, row: AsyncRow, max_model_len: int | None, streams: bool, tell: Tell) -> None:
        """Have vLLM answer a row, and tell of its tokens; cancelled, it ends the row there too."""
        try:
            async with self._slots:
                for _ in range(_NUM_TRIES):
                    inputs = await self._encode(row, max_model_len)
                    if await self._run(row, inputs, streams, tell):
                        return
                raise RuntimeError(f"vLLM lost the row's images {_NUM_TRIES} times")
        except Exception as error:  # who waits in another thread has to hear of all of them
            tell(Event(row.index, error=error))

    async def score(self, text: str, adapter: LoRARequest | None) -> list[dict[int, float]]:
        """Return how likely the base, or an adapter, holds the tokens of a text."""
        from vllm import SamplingParams

        (inputs,) = await self._render({"prompt_token_ids": self._processor.tokenizer(text)["input_ids"]})
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        places: list[Any] = []
        async for output in self.llm.generate(inputs, params, uuid.uuid4().hex, lora_request=adapter):
            places = output.prompt_logprobs
        return [{token: entry.logprob for token, entry in (place or {}).items()} for place in places]

    async def score_first(self, row: AsyncRow, number: int) -> dict[int, float]:
        """Return how likely the model holds so many tokens to begin the answer to a row."""
        from vllm import SamplingParams

        inputs = await self._encode(row, None)
        params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=number, detokenize=False)
        found: Any = {}
        async for output in self.llm.generate(inputs, params, uuid.uuid4().hex, lora_request=row.adapter):
            (found,) = output.outputs[0].logprobs
        return {token: entry.logprob for token, entry in found.items()}

    async def add_adapter(self, adapter: LoRARequest) -> None:
        """Load an adapter."""
        await self.llm.add_lora(adapter)

    async def remove_adapter(self, adapter: LoRARequest) -> None:
        """Drop an adapter."""
        await self.llm.remove_lora(adapter.lora_int_id)

    async def stop(self) -> None:
        """End vLLM's processes."""
        self.decoders.shutdown(cancel_futures=True)
        self.llm.shutdown()
        del self.llm  # now, as it shuts down again when it goes, and cannot once Python ends

    async def _encode(self, row: AsyncRow, max_model_len: int | None) -> Any:
        """Return a row as vLLM takes it, and note how long its answer may be."""
        self._count(encoding=1)
        try:
            prompt: dict[str, Any] = {"prompt_token_ids": row.token_ids}
            if row.request.images:
                row.images = row.images or self.decoders.submit(decode, row.request.images)
                prompt["multi_modal_data"] = {"image": await asyncio.wrap_future(row.images)}
                prompt["multi_modal_uuids"] = {"image": [*map(image_name, row.request.images)]}
            (inputs,) = await self._render(prompt)
        finally:
            self._count(encoding=-1)
        row.num_prompt_tokens = len(inputs["prompt_token_ids"])
        row.max_new_tokens = limit_answer(row.request, row.num_prompt_tokens, max_model_len)
        ends = row_end_ids(row, self._settings)
        request, tokenizer = row.request, self._processor.tokenizer
        row.answer = Answer(tokenizer, row.max_new_tokens, ends, request.stop, request.min_new_tokens)
        return inputs

    async def _render(self, prompt: dict[str, Any]) -> Sequence[Any]:
        return await self.llm.renderer.render_cmpl_async([prompt])

    async def _run(self, row: AsyncRow, inputs: Any, streams: bool, tell: Tell) -> bool:
        """Pass a row to vLLM; tell whether that had all of it."""
        params = sampling_params(row, self._settings, streams=streams)
        self._count(running=1)
        try:
            outputs = self.llm.generate(inputs, params, uuid.uuid4().hex, lora_request=row.adapter)
            async for output in outputs:
                (answer,) = output.outputs
                if answer.finish_reason == "error":
                    return False
                row.num_cached_tokens = output.num_cached_tokens
                logprobs = self._describe(row, answer.token_ids, answer.logprobs)
                tell(Event(row.index, list(answer.token_ids), logprobs, output.finished))
        finally:
            self._count(running=-1)
        return True

    def _describe(self, row: AsyncRow, token_ids: Sequence[int], places: Any) -> list[TokenLogprob]:
        """Put in words what vLLM says of the tokens of a row, and of others in their places."""
        wanted = row.request.num_logprobs
        if wanted is None or places is None:
            return []
        found = []
        for token_id, place in zip(token_ids, places, strict=True):
            ranked = sorted(place.items(), key=lambda item: item[1].rank)[:wanted]
            top = [(other, entry.logprob) for other, entry in ranked]
            found.append(self._texts.describe(token_id, place[token_id].logprob, top))
        return found

    def _count(self, *, encoding: int = 0, running: int = 0) -> None:
        """Note a row that comes or goes, and how long the model has waited for the next."""
        now = time.perf_counter()
        if self._idle_since is not None:
            self.waited_s += now - self._idle_since
        self._num_encoding += encoding
        self._num_running += running
        self._idle_since = now if self._num_encoding and not self._num_running else None

    def _use_image_processor(self) -> None:
        """Have vLLM's processor make of images what ours does: its own resizes by way of torchvision.

        vLLM keeps one processor for all prompts, so it has ours from now on.
        """
        info = self.llm.renderer.get_mm_processor().info
        info.get_hf_processor().image_processor = self._processor.image_processor
        if info.get_hf_processor().image_processor is not self._processor.image_processor:
            raise RuntimeError("this version of vLLM makes a processor for each prompt; use vllm 0.32")
