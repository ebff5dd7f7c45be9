"""Forms of answers for a model's tokenizer: which tokens may come next.

    Form -> Grammars.matcher, of each row -> allow -> scores of the tokens that may come next

Shapes: `B` rows of the batch, `V` vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from vlmray.engines.forms import explain, to_grammar
from vlmray.schema import Form

_MOST_COMPILED = 256


class Grammars:
    """Compiles forms, each once.

    Args:
        tokenizer: The model's.
        end_ids: Tokens that end an answer; they may come where the form is complete.
    """

    def __init__(self, tokenizer: Any, end_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = sorted(end_ids)
        self._compile = functools.lru_cache(_MOST_COMPILED)(self._compile_anew)

    def check(self, form: Form) -> None:
        """Compile a form.

        Raises:
            ValueError: It cannot be compiled, or not for this tokenizer.
        """
        self._compile(form)

    def matcher(self, form: Form) -> LLMatcher:
        """Return what follows an answer of a form, from its first token on; raises what `check` does."""
        return self._compile(form).deep_copy()

    def _compile_anew(self, form: Form) -> LLMatcher:
        matcher = LLMatcher(self._vocabulary, to_grammar(form), log_level=0)
        if matcher.is_error():
            raise ValueError(explain(matcher.get_error()))
        return matcher

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        if getattr(self._tokenizer, "backend_tokenizer", None) is None:
            raise ValueError("this model's tokenizer has no vocabulary that a form of answers can be put in")
        return from_tokenizer(self._tokenizer, eos_token=self._end_ids or None)


def allow(scores: torch.Tensor, matchers: Sequence[LLMatcher | None]) -> torch.Tensor:
    """Return scores (B, V) that are minus infinity for what a row's form does not allow next.

    Those of rows without a matcher stay as they are.
    """
    width = scores.shape[1]
    bits = allocate_token_bitmask(len(matchers), width)  # all ones
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            bits[row] = 0  # what the tokenizer does not have is not allowed
            fill_next_token_bitmask(matcher, bits, row)
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :width]
    forbidden = torch.from_numpy(allowed == 0).to(scores.device)
    return scores.masked_fill(forbidden, float("-inf"))
