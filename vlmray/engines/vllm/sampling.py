"""How vLLM is told to draw an answer, so that it is what the other engines' is.

vLLM's own generation settings stay out of it (`generation_config="vllm"`): it would take the model's
temperature for requests that are greedy. What of the model's settings can be said to it is said here, the
rest is refused.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, GenerationConfig

from vlmray.engines.forms import as_regex, with_layout
from vlmray.engines.rows import Row, end_ids
from vlmray.engines.transformers.sampling import GREEDY_BELOW
from vlmray.engines.transformers.settings import least_new_tokens
from vlmray.errors import OptionError
from vlmray.schema import Form

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams


def read_settings(model_id: str, *, trust_remote_code: bool) -> GenerationConfig:
    """Read a model's generation config, as transformers does.

    Raises:
        OptionError: It asks for what vLLM cannot do.
    """
    try:
        config = GenerationConfig.from_pretrained(model_id)
    except OSError:  # there is none; transformers takes what the model's config says of it
        own = AutoConfig.from_pretrained(model_id, trust_remote_code=trust_remote_code)
        config = GenerationConfig.from_model_config(own)
    found = [name for name, is_set in _beyond_vllm(config).items() if is_set]
    if found:
        raise OptionError(
            "engine",
            f"vllm cannot follow {', '.join(found)} of this model's generation_config.json",
            "use --engine transformers, or take it out there",
        )
    return config


def _beyond_vllm(config: GenerationConfig) -> dict[str, bool]:
    return {
        "sequence_bias": bool(config.sequence_bias),
        "no_repeat_ngram_size": bool(config.no_repeat_ngram_size),
        "begin_suppress_tokens": bool(config.begin_suppress_tokens),
        "bad_words_ids": any(len(ids) > 1 for ids in config.bad_words_ids or ()),
    }


def sampling_params(row: Row, config: GenerationConfig, *, streams: bool) -> SamplingParams:
    """Return what vLLM is told of a row's answer.

    It sends tokens, not text: where that ends is for `Answer` to say, by the same rules for every engine.

    Args:
        row: With the length of its prompt, and the most tokens of its answer.
        config: The model's settings.
        streams: Whether tokens are wanted before all are there.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    request = row.request
    is_greedy = request.temperature < GREEDY_BELOW
    ends = row_end_ids(row, config)
    penalty = request.repetition_penalty
    return SamplingParams(
        max_tokens=row.max_new_tokens,
        min_tokens=min(least_tokens(row, config), row.max_new_tokens),
        temperature=0.0 if is_greedy else request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=(config.repetition_penalty or 1.0) if penalty is None else penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=None if is_greedy else _seed(request.seed, request.request_id),
        ignore_eos=True,  # all that ends an answer is named
        stop_token_ids=sorted(ends),
        logit_bias=_suppressed(config, ends) or None,
        structured_outputs=_structured(request.form),
        logprobs=request.num_logprobs,  # vLLM's own mode: of the model's scores, with the form's mask
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def _structured(form: Form | None) -> StructuredOutputsParams | None:
    """Return what vLLM is told of the form of an answer."""
    from vllm.sampling_params import StructuredOutputsParams

    if form is None:
        return None
    if form.schema is not None:
        return StructuredOutputsParams(json=with_layout(form.schema))
    return StructuredOutputsParams(regex=form.regex or as_regex(form.choices))


def row_end_ids(row: Row, config: GenerationConfig) -> set[int]:
    """Return the tokens that end a row's answer."""
    return {*(() if row.request.ignore_eos else end_ids(config)), *row.request.stop_token_ids}


def least_tokens(row: Row, config: GenerationConfig) -> int:
    """Return how many tokens an answer has before any of them may end it."""
    return max(row.request.min_new_tokens, least_new_tokens(config, row.num_prompt_tokens))


def _suppressed(config: GenerationConfig, ends: set[int]) -> dict[int, float]:
    """Return what no answer may hold."""
    words = {ids[0] for ids in config.bad_words_ids or ()} - ends  # as transformers: an end is no word
    return dict.fromkeys([*(config.suppress_tokens or ()), *sorted(words)], -math.inf)


def _seed(seed: int, request_id: str) -> int:
    digest: Any = hashlib.sha256(f"{seed}\0{request_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
