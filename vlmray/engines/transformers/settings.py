"""What answers follow of a model's generation config: its special tokens, and what looks at one row alone.

Rows are greedy or sampled, each by itself, so what searches with several rows is not followed
(`vlmray.models.source.settings_not_followed`). How answers are drawn, and how long they are, requests say.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)


def plain_config(own: GenerationConfig) -> GenerationConfig:
    """Return a config for greedy `generate` that takes over nothing of the model's but its special tokens.

    No token ends a row there; who calls `generate` knows when one has ended.
    """
    return GenerationConfig(
        do_sample=False, num_beams=1, bos_token_id=own.bos_token_id, pad_token_id=own.pad_token_id
    )


def least_new_tokens(config: GenerationConfig, num_prompt_tokens: int) -> int:
    """Return how many tokens a model's settings want of an answer, at least."""
    return max(config.min_new_tokens or 0, (config.min_length or 0) - num_prompt_tokens)


def own_processors(
    config: GenerationConfig,
    *,
    end_ids: Collection[int],
    num_prompt_tokens: int,
    min_new_tokens: int,
    device: Any = "cpu",
) -> list[LogitsProcessor]:
    """Make the processors of a row that is alone and has no padding.

    Args:
        config: The model's settings.
        end_ids: Tokens that end the row.
        num_prompt_tokens: Length of its prompt.
        min_new_tokens: It does not end before it has so many.
        device: Where its ids are.
    """
    ends = sorted(token for token in end_ids if 0 <= token < 2**31)
    found: list[LogitsProcessor] = []
    if config.sequence_bias:
        found.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        found.append(NoBadWordsLogitsProcessor(config.bad_words_ids, ends))
    if config.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    if config.begin_suppress_tokens:
        found.append(
            SuppressTokensAtBeginLogitsProcessor(
                config.begin_suppress_tokens, num_prompt_tokens, device=device
            )
        )
    if min_new_tokens and ends:
        found.append(
            MinNewTokensLengthLogitsProcessor(num_prompt_tokens, min_new_tokens, ends, device=device)
        )
    return found
