"""What of a model's `generation_config.json` is followed when it answers, and what is not.

Rows of a batch are answered greedily or sampled, each by itself. Settings that look at one row alone are
followed; those that search with several rows, or that only `generate` itself can do, are not. How answers are
drawn and how long they are is said by requests.
"""

from __future__ import annotations

import logging
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

_LOG = logging.getLogger(__name__)

_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "stop_strings": ([], ""),
    "token_healing": (False,),
    "watermarking_config": (),
    "max_time": (),
}
"""Settings that would change answers, with the values, beside None, at which they do not."""


def settings_not_followed(config: GenerationConfig) -> dict[str, Any]:
    """Return the settings that would change answers and are not followed."""
    found = {name: getattr(config, name, None) for name in _NOT_FOLLOWED}
    return {
        name: value for name, value in found.items() if value is not None and value not in _NOT_FOLLOWED[name]
    }


def warn_of_settings(model_id: str, config: GenerationConfig) -> None:
    """Say in one line which settings of a model are not followed."""
    found = settings_not_followed(config)
    if found:
        said = ", ".join(f"{name}={value!r}" for name, value in found.items())[:300]
        _LOG.warning(
            "%s: its generation_config.json has %s, which is not followed: each answer is greedy or sampled "
            "by itself",
            model_id, said,
        )  # fmt: skip


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
    found: list[LogitsProcessor] = []
    if config.sequence_bias:
        found.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        found.append(NoBadWordsLogitsProcessor(config.bad_words_ids, sorted(end_ids)))
    if config.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    if config.begin_suppress_tokens:
        found.append(
            SuppressTokensAtBeginLogitsProcessor(
                config.begin_suppress_tokens, num_prompt_tokens, device=device
            )
        )
    if min_new_tokens and end_ids:
        found.append(
            MinNewTokensLengthLogitsProcessor(
                num_prompt_tokens, min_new_tokens, sorted(end_ids), device=device
            )
        )
    return found
