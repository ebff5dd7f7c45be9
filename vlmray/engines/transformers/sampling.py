"""Choose tokens row by row, so that no row depends on its batch.

Shapes: `B` rows of the batch, `T` tokens so far (left padding included), `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from llguidance import LLMatcher
from torch.nn.functional import pad
from transformers import LogitsProcessor, StoppingCriteria

from vlmray.engines.transformers.grammars import allow
from vlmray.schema import GenerationRequest

GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow."""


class RowwiseLogitsProcessor(LogitsProcessor):
    """Penalties and sampling, each row by its own request; for `generate(do_sample=False)`.

    transformers samples a batch from one global random stream and counts padding as text that was
    already said. Here the argmax that `generate` takes afterwards is greedy for greedy rows, and a draw
    from the row's own distribution for the others: the argmax of log-probabilities plus Gumbel noise is
    distributed as the softmax, and the noise is seeded by the request alone.

    What the model said before all that is kept for rows that ask for log-probabilities.

    Args:
        requests: The rows of the batch, B in order.
        attention_mask: (B, T) of the prompts, 0 for padding.
        repetition_penalty: The model's own, for requests that ask for none; 1 is none.
        num_tokens: Of each row's answer, where the prompts hold its beginning already.
        own: Processors of each row, that see it without its neighbours and padding.
        matchers: Of each row that has a form, what follows its answer.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        attention_mask: torch.Tensor,
        repetition_penalty: float = 1.0,
        num_tokens: Sequence[int] | None = None,
        own: Sequence[Sequence[LogitsProcessor]] | None = None,
        matchers: Sequence[LLMatcher | None] = (),
    ) -> None:
        self.requests = list(requests)
        self.attention_mask = attention_mask
        self.num_tokens = list(num_tokens or [0] * len(self.requests))
        self.is_finite = torch.ones(len(self.requests), dtype=torch.bool)
        """(B,) which rows the model gave numbers for at the last step: not NaN, nor infinite at the top."""

        self.logprobs: list[tuple[float, list[tuple[int, float]]] | None] = [None] * len(self.requests)
        """Of each row that asks, how likely its last token was, and the likeliest in its place."""

        self._asking = [place for place, each in enumerate(self.requests) if each.num_logprobs is not None]
        self._said_by_model: torch.Tensor | None = None
        self._matchers = matchers if any(matchers) else ()
        self._own = list(own or [()] * len(self.requests))
        self._repetition = self._column(
            [
                repetition_penalty if request.repetition_penalty is None else request.repetition_penalty
                for request in self.requests
            ],
            neutral=1.0,
        )
        self._presence = self._column([request.presence_penalty for request in self.requests])
        self._frequency = self._column([request.frequency_penalty for request in self.requests])
        self._num_prompt_tokens: int | None = None
        self._seen: torch.Tensor | None = None
        self._said: torch.Tensor | None = None

    def _column(self, values: list[float], neutral: float = 0.0) -> torch.Tensor | None:
        """Put a setting of each row into (B, 1); None where it changes no row."""
        if all(value == neutral for value in values):
            return None
        return torch.tensor(values, device=self.attention_mask.device).unsqueeze(1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores (B, V) whose argmax is each row's next token, given the ids so far (B, T)."""
        if self._num_prompt_tokens is None:
            self._num_prompt_tokens = input_ids.shape[1]
        step = input_ids.shape[1] - self._num_prompt_tokens
        self.is_finite = scores.amax(dim=-1).isfinite()
        if self._matchers:
            scores = allow(scores, self._matchers)
        self._said_by_model = scores if self._asking else None
        if self._repetition is not None:
            scores = self._penalize_seen(input_ids, scores, self._repetition)
        if self._presence is not None or self._frequency is not None:
            scores = self._penalize_said(input_ids, scores)
        alone = [
            row
            for row, request in enumerate(self.requests)
            if self._own[row] or request.temperature >= GREEDY_BELOW
        ]
        if alone:
            scores = scores.clone()
            for row in alone:
                scores[row] = self._choose(row, step, input_ids, scores[row])
        if self._matchers:  # a model's own settings may leave nothing of what a form allows
            self.is_finite &= scores.amax(dim=-1) > float("-inf")
        return scores

    def note(self, token_ids: torch.Tensor) -> None:
        """Find the log-probabilities of what was chosen (B,), and of the likeliest, for rows that ask."""
        if self._said_by_model is None:
            return
        scores = self._said_by_model
        if len(self._asking) < len(scores):
            scores, token_ids = scores[self._asking], token_ids[self._asking]
        total = scores.logsumexp(dim=-1, keepdim=True)
        own = (scores.gather(1, token_ids.unsqueeze(1)) - total).squeeze(1).tolist()
        most = min(max(self.requests[row].num_logprobs or 0 for row in self._asking), scores.shape[1])
        top = scores.topk(most)
        likeliest = zip(top.indices.tolist(), (top.values - total).tolist(), strict=True)
        for row, logprob, (ids, values) in zip(self._asking, own, likeliest, strict=True):
            pairs = zip(ids, values, strict=True)
            self.logprobs[row] = logprob, list(pairs)[: self.requests[row].num_logprobs or 0]

    def _choose(self, row: int, step: int, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return one row's scores (V,) as its own processors and settings have them."""
        if self._own[row]:
            ids = input_ids[row, pad(self.attention_mask[row], (0, step), value=1).bool()]
            for processor in self._own[row]:
                scores = processor(ids.unsqueeze(0), scores.unsqueeze(0)).squeeze(0)
        request = self.requests[row]
        if request.temperature < GREEDY_BELOW:
            return scores
        return sample_scores(scores, request, self.num_tokens[row] + step)

    def _penalize_seen(
        self, input_ids: torch.Tensor, scores: torch.Tensor, penalties: torch.Tensor
    ) -> torch.Tensor:
        """Lower the score of every token of the row, prompt included, padding left out."""
        vocab_size = scores.shape[1]
        if self._seen is None:
            # Padding, and placeholder ids beyond the output vocabulary, go to one spare column.
            new = torch.where(self.attention_mask.bool(), input_ids, vocab_size).clamp(max=vocab_size)
            self._seen = torch.zeros(len(scores), vocab_size + 1, dtype=torch.bool, device=scores.device)
        else:
            new = input_ids[:, -1:].clamp(max=vocab_size)
        self._seen.scatter_(1, new, True)
        penalized = torch.where(scores < 0, scores * penalties, scores / penalties)
        return torch.where(self._seen[:, :vocab_size], penalized, scores)

    def _penalize_said(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Lower the scores of tokens of the answer, and more those that it holds more often."""
        vocab_size = scores.shape[1]
        if self._said is None:
            self._said = torch.zeros(len(scores), vocab_size + 1, device=scores.device)
            new = [input_ids[row, input_ids.shape[1] - count :] for row, count in enumerate(self.num_tokens)]
        else:
            new = list(input_ids[:, -1:])
        for said, ids in zip(self._said, new, strict=True):
            said.index_add_(0, ids.clamp(max=vocab_size), torch.ones_like(ids, dtype=said.dtype))
        counts = self._said[:, :vocab_size]
        if self._frequency is not None:
            scores = scores - self._frequency * counts
        return scores if self._presence is None else scores - self._presence * (counts > 0)


def sample_scores(scores: torch.Tensor, request: GenerationRequest, step: int) -> torch.Tensor:
    """Return scores (V,) whose argmax is one draw from a row's distribution.

    Args:
        scores: Logits of one row.
        request: Its temperature, min_p, top_k, top_p (which apply in this order), seed and id.
        step: Which token of the answer this is, from 0.
    """
    scores = scores / request.temperature
    if request.min_p > 0:
        scores = scores.masked_fill(scores < scores.max() + math.log(request.min_p), float("-inf"))
    if 0 < request.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(request.top_k).values[-1], float("-inf"))
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
        note: Called with the tokens (B,) that were chosen, before any of them is read.
    """

    def __init__(
        self,
        num_rows: int,
        read: Callable[[int, int | None], bool],
        num_to_end: int,
        is_finite: Callable[[], torch.Tensor],
        note: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self._ended = [False] * num_rows
        self._read = read
        self._is_finite = is_finite
        self._note = note
        self._num_to_end = num_to_end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Return which rows (B,) are done with, given the ids so far (B, T)."""
        if self._note is not None:
            self._note(input_ids[:, -1])
        chosen = zip(input_ids[:, -1].tolist(), self._is_finite().tolist(), strict=True)
        for row, (token_id, is_finite) in enumerate(chosen):
            self._ended[row] = self._ended[row] or self._read(row, token_id if is_finite else None)
        if sum(self._ended) >= self._num_to_end:
            return torch.ones(len(self._ended), dtype=torch.bool, device=input_ids.device)
        return torch.tensor(self._ended, device=input_ids.device)
