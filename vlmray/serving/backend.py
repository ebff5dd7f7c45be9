"""What the gateway needs of whoever holds the models."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from vlmray.schema import Completion, GenerationRequest, TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer, and how likely new tokens of it are; others are texts alone."""

    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of an answer."""

    completion: Completion
    batch_size: int
    """Requests that shared its forward pass."""


class Backend(Protocol):
    """Whoever answers."""

    def answer(self, request: GenerationRequest, *, stream: bool) -> AsyncGenerator[str | Piece | Reply]:
        """Yield pieces, if `stream`, and last a `Reply` with all of it.

        Cancelled or closed before that, it lets go of all that is done for the request.

        Raises:
            BusyError: before the first piece.
        """
        ...

    async def is_ready(self) -> bool:
        """Tell whether a request would be answered."""
        ...

    async def max_model_len(self) -> int | None:
        """Return the most tokens of a prompt and its answer; None where it is not known, or not yet."""
        ...
