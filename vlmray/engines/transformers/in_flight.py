"""Requests on their way through the engine, and whoever listens to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

from vlmray.engines.base import Cancelled, OnEnd, OnText, failed_completion
from vlmray.engines.streamed_text import Answer
from vlmray.models.adapters import Adapter
from vlmray.models.inputs import chain_segments
from vlmray.schema import Completion, FinishReason, GenerationRequest

_NOT_FINITE = (
    "the model's scores for the next token are not finite (NaN or infinity); look for such values in the "
    "weights of model and adapter, or try --dtype float32"
)


@dataclass(slots=True)
class InFlight:
    """A request on its way through the engine."""

    index: int
    request: GenerationRequest
    prompt: str = ""
    """As people read it."""

    num_tokens: int = 0
    """Prompt and visual tokens; an estimate from the image sizes, good enough to order rows."""

    adapter: Adapter | None = None
    head: tuple[Any, ...] | None = None
    """What it begins with: adapter, text up to the last image, and the images; None where that is not
    shared with other rows."""

    tail: str = ""
    """The rest of the prompt, as it is encoded; all of it, where there is no head."""

    num_tail_tokens: int = 0

    encoded_head: Future[dict[str, torch.Tensor]] | None = None
    encoded: Future[dict[str, torch.Tensor]] | None = None
    """The rest of the row; all of it, where there is no head."""

    answer: Answer | None = None
    processors: Sequence[LogitsProcessor] = ()
    """What its scores go through, without its neighbours."""

    completion: Completion | None = None
    num_prompt_tokens: int = 0
    max_new_tokens: int = 0
    """Most tokens of its answer: what was asked for, or less where the model's positions end."""

    num_sent: int = 0
    """Characters that were streamed; a batch that is tried again does not send them twice."""

    @property
    def group(self) -> int:
        """What rows must have in common to share a forward pass, as far as adapters go."""
        return 0 if self.adapter is None or self.adapter.mixes else self.adapter.number

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The encoded row, copied together where it has a head; raises what encoding raised."""
        return chain_segments(self.segments) if self.encoded_head is not None else self.tail_inputs

    @property
    def segments(self) -> list[dict[str, torch.Tensor]]:
        """What the encoded row consists of, as it is; raises what encoding raised."""
        return [self.tail_inputs] if self.encoded_head is None else [self.head_inputs, self.tail_inputs]

    @property
    def head_inputs(self) -> dict[str, torch.Tensor]:
        """The encoded beginning."""
        assert self.encoded_head is not None
        return self.encoded_head.result()

    @property
    def tail_inputs(self) -> dict[str, torch.Tensor]:
        """The encoded rest."""
        assert self.encoded is not None
        return self.encoded.result()

    def complete(self, reason: FinishReason) -> Completion:
        """Return the completion of a row that ends with what it has."""
        return Completion(
            text=self.answer.settled if self.answer is not None else "",
            prompt=self.prompt,
            num_prompt_tokens=self.num_prompt_tokens,
            num_completion_tokens=self.answer.num_tokens if self.answer is not None else 0,
            finish_reason=reason,
        )


Heads = dict[Any, Future[dict[str, torch.Tensor]]]
"""Encoded beginnings, or those to come, of rows that share them."""


class Prepared(list[GenerationRequest]):
    """Requests, and how far the engine is with them."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        super().__init__(requests)
        self.rows = [InFlight(index, request) for index, request in enumerate(requests)]
        self.queue: deque[InFlight] = deque()
        self.heads: Heads = {}


@dataclass(frozen=True, slots=True)
class Listener:
    """Whoever wants to hear of answers before all are there."""

    on_text: OnText | None
    on_end: OnEnd | None
    cancelled: Cancelled | None

    def text(self, row: InFlight, text: str) -> None:
        """Send what is new in a row's text."""
        if self.on_text is not None and len(text) > row.num_sent:
            self.on_text(row.index, text[row.num_sent :])
            row.num_sent = len(text)

    def end(self, row: InFlight, completion: Completion) -> None:
        """Close a row."""
        row.encoded = row.encoded_head = None  # pixels are large and needed no more
        row.completion = completion
        if self.on_end is not None:
            self.on_end(row.index, completion)

    def end_if_cancelled(self, row: InFlight) -> bool:
        """Close a row that nobody wants any more; tell whether it was one."""
        unwanted = self.cancelled is not None and self.cancelled(row.index)
        if unwanted:
            self.end(row, row.complete("cancelled"))
        return unwanted


def read_token(rows: list[InFlight], listener: Listener, index: int, token_id: int | None) -> bool:
    """Add a row's next token to its answer and tell whether it ends there; None is a failure of the model."""
    row = rows[index]
    if listener.end_if_cancelled(row):
        return True
    if token_id is None:
        listener.end(row, failed_completion(FloatingPointError(_NOT_FINITE), prompt=row.prompt))
        return True
    answer = row.answer
    assert answer is not None
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
