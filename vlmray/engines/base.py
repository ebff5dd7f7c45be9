"""The contract between everything that asks a model and everything that runs one.

An engine turns `GenerationRequest`s into `Completion`s. The same protocol feeds batches of Ray Data,
requests of Ray Serve, and plain Python without Ray; nothing in `vlmray.engines` imports Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from vlmray.config.sampling import sampling_problems
from vlmray.engines.forms import check_form
from vlmray.errors import ContextLengthError, one_line
from vlmray.schema import Completion, GenerationRequest, TokenLogprob

OnText = Callable[[int, str], None]
"""Called with the place of a request and the text that it got since the last call."""

OnEnd = Callable[[int, Completion], None]
"""Called with the place of a request and its completion."""

OnLogprobs = Callable[[int, Sequence[TokenLogprob]], None]
"""Called with the place of a request and the log-probabilities of tokens that it got since the last call."""

Cancelled = Callable[[int], bool]
"""Called with the place of a request; tells whether nobody wants its answer any more."""


class DeadEngineError(RuntimeError):
    """The process that holds an engine's model is gone; only another engine can go on."""


@runtime_checkable
class Engine(Protocol):
    """Answers requests with one model.

    What every engine promises, and `tests/engines/test_contract.py` holds:

    * **One to one, in order.** `generate` returns as many completions as it got requests, each at its
      request's place, whatever mix of image counts, image sizes, lengths, sampling settings and
      adapters the call holds. No requests, no completions.
    * **Neighbours do not matter.** A greedy text is a function of its request alone: not of the other
      rows, their order or the batch size (exact in float32; lower precisions may flip a near tie).
      A sampled text (`temperature` above 0) is a function of its request, `seed` and `request_id`
      included, in the same sense.
    * **A bad row is an answer, not an exception.** A request that cannot be answered (placeholders and
      images that do not match, an image the processor refuses, an unknown adapter, a row too large
      for the memory) becomes a completion with `finish_reason="error"`, an empty text and the reason
      in `error`; its neighbours are answered as if it were not there. Only a broken engine raises.
    * **A form is kept.** The answer to a request that has a `form` is of that form, however it is drawn,
      unless it is cut (`finish_reason="length"`) or stopped by a text or token that the request names.
    * **A text is text.** Special tokens in a message's text are encoded as the characters they are written
      with; only the chat template writes turns and placeholders.
    * **Streamed text is the text.** The pieces that `on_text` gets for a request, joined, are the text of
      its completion. `on_end` gets each completion as soon as it is there, after all its pieces. Both are
      called by the thread that called `generate`, before it returns.
    * **Log-probabilities are the model's own.** A request with `num_logprobs` gets those of all tokens of its
      answer (`vlmray.schema.TokenLogprob`), the same to 1e-5 in float32 whatever its neighbours are and
      whatever it shares with them; the others pay nothing for it. `on_logprobs` gets each once and in order,
      before the text that it makes.
    * **A row that nobody wants ends.** `cancelled` is asked of every row before its first token and between
      any two, in the thread that called `generate`. Once it is true the row gets no more of them: its
      completion has what was streamed so far and `finish_reason="cancelled"`. Its neighbours are answered as
      if it had gone on.
    * **Counts are the row's own**: padding is counted nowhere, visual tokens are, and so is the end
      token when the model wrote one.

    An engine is used by as many threads at a time as `vlmray.engines.calls_at_once` says, except for `check`
    and `prepare`.
    """

    max_model_len: int | None
    """Most tokens of a prompt and its answer together; None where no limit is known. A longer prompt is an
    error whose code is `context_length_exceeded`, an answer ends there with `finish_reason="length"`."""

    @property
    def waited_s(self) -> float:
        """Seconds of all calls of `generate` so far in which the model waited for requests to be made ready.

        That is: worded, their images decoded and encoded.
        """
        ...

    def prepare(self, requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """Begin to make requests ready; `generate` takes what this returns in the place of them, once.

        Whoever calls it while another thread is in `generate` spares the model the wait for the next ones.
        """
        ...

    def check(self, request: GenerationRequest) -> Completion | None:
        """Return the failed completion of a request that can be told to fail without the model, else None.

        Like `prepare` it may run beside `generate`.
        """
        ...

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
        cancelled: Cancelled | None = None,
        on_logprobs: OnLogprobs | None = None,
    ) -> list[Completion]:
        """Answer every request that is not `cancelled`, in order.

        `on_text`, `on_logprobs` and `on_end` are told of what there is as soon as it is.
        """
        ...

    def close(self) -> None:
        """Free the model's memory; the engine is not used after that. Calling it twice is harmless."""
        ...


def check_request(request: GenerationRequest) -> None:
    """Check what can be checked of a request without a model.

    Raises:
        ValueError: Sampling settings out of range, a form that cannot be compiled, or not one image for each
            placeholder.
    """
    for name, problem in sampling_problems(request):
        raise ValueError(f"{name} {problem}")
    if request.continue_final_message and request.add_generation_prompt:
        raise ValueError("continue_final_message needs add_generation_prompt to be false")
    if request.form is not None:
        check_form(request.form)
        for name in ("min_new_tokens", "ignore_eos"):
            if getattr(request, name):
                raise ValueError(f"{name} goes on where the form of the answer lets it end")
    contents = [message["content"] for message in request.messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    num_places = sum(part.get("type") in ("image", "image_url") for part in parts)
    if num_places != len(request.images):
        raise ValueError(f"the messages have {num_places} image places for {len(request.images)} images")


def limit_answer(request: GenerationRequest, num_prompt_tokens: int, max_model_len: int | None) -> int:
    """Return the most tokens that a model of `max_model_len` can write after a prompt.

    Raises:
        ContextLengthError: None at all.
    """
    if max_model_len is None:
        return request.max_new_tokens
    if num_prompt_tokens >= max_model_len:
        raise ContextLengthError(num_prompt_tokens, max_model_len)
    return min(request.max_new_tokens, max_model_len - num_prompt_tokens)


def failed_completion(error: Exception, *, prompt: str = "") -> Completion:
    """Return the completion of a request that could not be answered."""
    reason = one_line(f"{type(error).__name__}: {error}", 500)
    return Completion(
        text="",
        prompt=prompt,
        num_prompt_tokens=0,
        num_completion_tokens=0,
        finish_reason="error",
        error=reason,
        error_code=getattr(error, "code", None),
    )
