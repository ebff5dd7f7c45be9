"""Fields of OpenAI's and vLLM's requests that would change an answer and are not supported.

They are refused, not ignored, unless they have a value that changes nothing. Fields that are not in the table
are ignored: clients send more and more of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    # tools
    "functions": ([],),
    "function_call": ("none", "auto"),
    "web_search_options": (),
    "documents": ([],),
    # what the answer has to look like
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": ([],),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "moderation": (),
    "echo": (False,),
    "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    # what comes beside it
    "prompt_logprobs": (0,),
    "logprob_token_ids": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_prompt_text": (False,),
    # how it is searched for
    "best_of": (1,),
    "use_beam_search": (False,),
    "num_beams": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "vllm_xargs": ({},),
    "repetition_detection": (),
    "thinking_token_budget": (),
    "watermarking": (False,),
    "stop_regex": ([],),
    "typical_p": (1,),
    "top_a": (0,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "mirostat_mode": (0,),
    "repeat_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    # how the prompt is made
    "chat_template": (),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (False,),
    "lora_path": (),
    "lora_request": (),
    "prompt_embeds": (),
    # other names of what there is
    "max_new_tokens": (),
    "max_output_tokens": (),
    "min_new_tokens": (0,),
    "max_length": (),
    "num_predict": (),
    "n_predict": (),
    "stop_sequences": ([],),
    "do_sample": (),
    "instructions": ("",),
    "input": (),
    "prompt": (),
    "system": ("",),
}
"""The values, beside null, at which they make no difference."""

_INSTEAD = {
    "guided_json": "response_format",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_length": "max_tokens",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_sequences": "stop",
    "stop_regex": "stop",
    "repeat_penalty": "repetition_penalty",
    "do_sample": "temperature",
    "instructions": "a message of role system",
    "system": "a message of role system",
    "input": "messages",
    "prompt": "messages",
    "lora_path": "model",
    "lora_request": "model",
}


def find_unsupported(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the name of a field that cannot be heeded, and what is to be said of it.

    Args:
        fields: Those of a request that it has no place for.
    """
    for name, value in fields.items():
        if name in _NOT_SUPPORTED and value is not None and value not in _NOT_SUPPORTED[name]:
            instead = f"; use {_INSTEAD[name]}" if name in _INSTEAD else ""
            return name, f"{name} is not supported{instead}"
    return None
