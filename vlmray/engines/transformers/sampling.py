"""Choose tokens row by row, so that no row depends on its batch.

Shapes: `B` rows of the batch, `T` tokens so far (left padding included), `V` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from transformers import LogitsProcessor, StoppingCriteria

from vlmray.schema import GenerationRequest

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""


class RowwiseLogitsProcessor(LogitsProcessor):
    """Repetition penalty and sampling, each row by its own request; for `generate(do_sample=False)`.

    transformers samples a batch from one global random stream and counts padding as text that was
    already said. Here the argmax that `generate` takes afterwards is greedy for greedy rows, and a draw
    from the row's own distribution for the others: the argmax of log-probabilities plus Gumbel noise is
    distributed as the softmax, and the noise is seeded by the request alone.

    Args:
        requests: The rows of the batch, B in order.
        attention_mask: (B, T) of the prompts, 0 for padding.
        repetition_penalty: As in the model's generation config; 1 is none.
        num_tokens: Of each row's answer, where the prompts hold its beginning already.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        attention_mask: torch.Tensor,
        repetition_penalty: float = 1.0,
        num_tokens: Sequence[int] | None = None,
    ) -> None:
        self.requests = list(requests)
        self.attention_mask = attention_mask
        self.repetition_penalty = repetition_penalty
        self.num_tokens = list(num_tokens or [0] * len(self.requests))
        self.is_finite = torch.ones(len(self.requests), dtype=torch.bool)
        """(B,) which rows the model gave numbers for at the last step: not NaN, nor infinite at the top."""

        self._num_prompt_tokens: int | None = None
        self._seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) whose argmax is each row's next token, given the ids so far (B, T)."""
        if self._num_prompt_tokens is None:
            self._num_prompt_tokens = input_ids.shape[1]
        step = input_ids.shape[1] - self._num_prompt_tokens
        self.is_finite = scores.amax(dim=-1).isfinite()
        if self.repetition_penalty != 1.0:
            scores = self._penalize(input_ids, scores)
        sampled = [row for row, request in enumerate(self.requests) if request.temperature >= GREEDY_BELOW]
        if sampled:
            scores = scores.clone()
            for row in sampled:
                scores[row] = sample_scores(scores[row], self.requests[row], self.num_tokens[row] + step)
        return scores

    def _penalize(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Lower the score of every token of the row, prompt included, padding left out."""
        vocab_size = scores.shape[1]
        if self._seen is None:
            # Padding, and placeholder ids beyond the output vocabulary, go to one spare column.
            new = torch.where(self.attention_mask.bool(), input_ids, vocab_size).clamp(max=vocab_size)
            self._seen = torch.zeros(len(scores), vocab_size + 1, dtype=torch.bool, device=scores.device)
        else:
            new = input_ids[:, -1:].clamp(max=vocab_size)
        self._seen.scatter_(1, new, True)
        penalized = torch.where(
            scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty
        )
        return torch.where(self._seen[:, :vocab_size], penalized, scores)


def sample_scores(scores: torch.Tensor, request: GenerationRequest, step: int) -> torch.Tensor:
    """Return scores (V,) whose argmax is one draw from a row's distribution.

    Args:
        scores: Logits of one row.
        request: Its temperature, top_p, seed and id.
        step: Which token of the answer this is, from 0.
    """
    scores = scores / request.temperature
    if request.top_p < 1.0:
        scores = keep_nucleus(scores, request.top_p)
    key = f"{request.seed}\0{request.request_id}\0{step}".encode()
    generator = torch.Generator(device=scores.device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)
    exponential = torch.empty_like(scores).exponential_(generator=generator)
    return scores - exponential.log()


def keep_nucleus(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set to minus infinity all but the likeliest tokens that together reach probability `top_p`."""
    ordered, order = scores.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays if those before it do not reach top_p yet; the first always does.
    outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
    outside[0] = False
    return scores.masked_fill(torch.zeros_like(outside).scatter_(0, order, outside), float("-inf"))


class RowwiseStoppingCriteria(StoppingCriteria):
    """End each row where its reader says so; the others go on.

    Args:
        num_rows: Rows of the batch, B.
        read: Called with row and token of every new token of a row that has not ended, and None for a token
            that was chosen by scores which are no numbers; returns whether the row ends with it.
        num_to_end: Once so many have ended, all stop: the caller goes on with the others.
        is_finite: Returns which rows (B,) have scores that are numbers.
    """

    def __init__(
        self,
        num_rows: int,
        read: Callable[[int, int | None], bool],
        num_to_end: int,
        is_finite: Callable[[], torch.Tensor],
    ) -> None:
        self._ended = [False] * num_rows
        self._read = read
        self._is_finite = is_finite
        self._num_to_end = num_to_end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Return which rows (B,) are done with, given the ids so far (B, T)."""
        chosen = zip(input_ids[:, -1].tolist(), self._is_finite().tolist(), strict=True)
        for row, (token_id, is_finite) in enumerate(chosen):
            self._ended[row] = self._ended[row] or self._read(row, token_id if is_finite else None)
        if sum(self._ended) >= self._num_to_end:
            return torch.ones(len(self._ended), dtype=torch.bool, device=input_ids.device)
        return torch.tensor(self._ended, device=input_ids.device)
