"""Requests on their way through an engine that hears of their tokens one by one, and who listens to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmray.engines.base import Cancelled, OnEnd, OnLogprobs, OnText, failed_completion
from vlmray.engines.streamed_text import Answer
from vlmray.schema import Completion, FinishReason, GenerationRequest, TokenLogprob

_NOT_FINITE = (
    "the model's scores for the next token are not finite (NaN or infinity); look for such values in the "
    "weights of model and adapter, or try --dtype float32"
)
_NOTHING_LEFT = (
    "the model's scores for the next token are not finite (NaN or infinity), or the model's generation "
    "config suppresses all that the form of the answer allows"
)


@dataclass(slots=True)
class Row:
    """A request on its way through an engine."""

    index: int
    request: GenerationRequest
    prompt: str = ""
    """As people read it."""

    answer: Answer | None = None
    completion: Completion | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int | None = None
    max_new_tokens: int = 0
    """Most tokens of its answer: what was asked for, or less where the model's positions end."""

    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens of its answer, where they are asked for."""

    num_sent: int = 0
    """Characters that were streamed; a row that is tried again does not send them twice."""

    num_logprobs_sent: int = 0

    def complete(self, reason: FinishReason) -> Completion:
        """Return the completion of a row that ends with what it has."""
        return Completion(
            text=self.answer.settled if self.answer is not None else "",
            prompt=self.prompt,
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=self.answer.num_tokens if self.answer is not None else 0,
            finish_reason=reason,
            num_cached_tokens=self.num_cached_tokens,
            logprobs=None if self.request.num_logprobs is None else tuple(self.logprobs),
        )

    def free(self) -> None:
        """Let go of what only an open row needs."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Whoever wants to hear of answers before all are there."""

    on_text: OnText | None
    on_end: OnEnd | None
    cancelled: Cancelled | None
    on_logprobs: OnLogprobs | None = None

    def token(self, row: Row, logprob: TokenLogprob) -> None:
        """Note how likely a row's next token was, and send what is new of that."""
        row.logprobs.append(logprob)
        if self.on_logprobs is not None and len(row.logprobs) > row.num_logprobs_sent:
            row.num_logprobs_sent = len(row.logprobs)
            self.on_logprobs(row.index, [logprob])

    def text(self, row: Row, text: str) -> None:
        """Send what is new in a row's text."""
        if self.on_text is not None and len(text) > row.num_sent:
            self.on_text(row.index, text[row.num_sent :])
            row.num_sent = len(text)

    def end(self, row: Row, completion: Completion) -> None:
        """Close a row."""
        row.free()
        row.completion = completion
        if self.on_end is not None:
            self.on_end(row.index, completion)

    def end_if_cancelled(self, row: Row) -> bool:
        """Close a row that nobody wants any more; tell whether it was one."""
        unwanted = self.cancelled is not None and self.cancelled(row.index)
        if unwanted:
            self.end(row, row.complete("cancelled"))
        return unwanted


def read_token(
    rows: Sequence[Row],
    listener: Listener,
    index: int,
    token_id: int | None,
    logprob: TokenLogprob | None = None,
) -> bool:
    """Add a row's next token to its answer and tell whether it ends there.

    Args:
        rows: All.
        listener: Hears of it.
        index: Place of the row.
        token_id: The token; None is a failure of the model.
        logprob: How likely it was, where the row asks for that.
    """
    row = rows[index]
    if listener.end_if_cancelled(row):
        return True
    if token_id is None:
        reason = _NOT_FINITE if row.request.form is None else _NOTHING_LEFT
        listener.end(row, failed_completion(FloatingPointError(reason), prompt=row.prompt))
        return True
    answer = row.answer
    assert answer is not None
    if logprob is not None:
        listener.token(row, logprob)
    ended = answer.push(token_id)
    if listener.on_text is not None:
        listener.text(row, answer.settled)
    if ended:
        listener.end(row, row.complete(answer.finish_reason or "stop"))
    return ended


def end_ids(config: Any) -> set[int]:
    """Return the tokens that end an answer."""
    ids = config.eos_token_id
    return set(ids) if isinstance(ids, list | tuple) else set() if ids is None else {int(ids)}
