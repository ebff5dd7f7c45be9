"""Requests on their way through the engine: what is encoded of them, and with whom they go."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from llguidance import LLMatcher
from transformers import LogitsProcessor

from vlmray.engines.rows import Row
from vlmray.models.adapters import Adapter
from vlmray.models.inputs import chain_segments
from vlmray.schema import GenerationRequest


@dataclass(slots=True)
class InFlight(Row):
    """A request on its way through the engine."""

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

    processors: Sequence[LogitsProcessor] = ()
    """What its scores go through, without its neighbours."""

    matcher: LLMatcher | None = None
    """What follows its answer, where that has a form."""

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

    def free(self) -> None:
        """Let go of the pixels, which are large."""
        self.encoded = self.encoded_head = None


Heads = dict[Any, Future[dict[str, torch.Tensor]]]
"""Encoded beginnings, or those to come, of rows that share them."""


class Prepared(list[GenerationRequest]):
    """Requests, and how far the engine is with them."""

    def __init__(self, requests: Sequence[GenerationRequest]) -> None:
        super().__init__(requests)
        self.rows = [InFlight(index, request) for index, request in enumerate(requests)]
        self.queue: deque[InFlight] = deque()
        self.heads: Heads = {}
