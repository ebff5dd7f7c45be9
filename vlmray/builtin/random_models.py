"""Small Qwen2.5-VL models with random weights, built from a seed.

All are complete checkpoint folders that plain transformers loads: weights, a tokenizer of their own with
Qwen's special tokens and chat template, processor files.

torch and transformers are imported inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmray.builtin.charts import ChartDataset, ChartsConfig
from vlmray.builtin.random_charts import LABELS, TITLES

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{%- if messages and messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type in ('image', 'image_url') -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""Qwen's chat format: a default system prompt, one placeholder triple an image, plain string content too."""

_TINY_WORDS = (
    "system user assistant You are a helpful what is the value of how many which year in chart bar line "
    "color blue red green orange percent share total average highest lowest difference between and answer "
    "question with single word phrase yes no more than less does shown title legend country sales people "
    "growth rate number million billion dollars euros Germany France Japan India China Brazil Canada"
)

# Qwen2.5-VL's own values, except max_pixels: transformers' default, not the 16384 tokens of the checkpoint.
_PREPROCESSOR_CONFIG = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 56 * 56,
    "max_pixels": 1280 * 28 * 28,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def build_untrained_model(path: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write the checkpoint that training of the built-in model begins from: 4 million random weights.

    Its vocabulary has every word of the chart questions and their answers as one token, and the 256 bytes for
    all other text. Weights are stored in bfloat16.

    Args:
        path: Folder to write; made if missing.
        seed: Seeds the weights.

    Returns:
        The folder.
    """
    import torch

    vocab, merges = _train_bpe([f"{word} {word}" for word in _chart_words()], max_size=4096)
    vocab_size = -(-(len(vocab) + len(SPECIAL_TOKENS)) // 64) * 64
    tokenizer = _build_tokenizer(vocab, merges, vocab_size)
    text = {
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 4096,
        # The head size is 64; its 32 frequencies are split over time, height and width.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
    }
    # Every layer attends to the whole image: a chart is hardly larger than one of Qwen's windows.
    vision = {
        "depth": 4, "hidden_size": 192, "intermediate_size": 384, "num_heads": 3,
        "fullatt_block_indexes": [0, 1, 2, 3],
    }  # fmt: skip
    model = _build_model(tokenizer, text, vision)
    _draw_trainable_weights(model, torch.Generator().manual_seed(seed))
    return _save(path, model.to(torch.bfloat16), tokenizer)


def build_tiny_random_model(
    path: str | os.PathLike[str], *, seed: int = 0, vocab_size: int = 512, hidden_size: int = 128
) -> Path:
    """Write a checkpoint of about 4 MB with random weights.

    The same seed and sizes give the same bytes. Greedy answers depend on the question and on the image,
    and some end with an end token.

    Args:
        path: Folder to write; made if missing.
        seed: Seeds the weights; another seed is another model with other answers.
        vocab_size: Tokens in all, the eight special ones included; at least 300.
        hidden_size: Width of the language model, a multiple of 32.

    Returns:
        The folder.
    """
    import torch

    if vocab_size < 300 or hidden_size < 32 or hidden_size % 32:
        raise ValueError(f"need vocab_size >= 300 and 32 | hidden_size, got {vocab_size} and {hidden_size}")
    texts = [f"{word} {word.capitalize()} {word}" for word in _TINY_WORDS.split()]
    vocab, merges = _train_bpe(texts, max_size=vocab_size - len(SPECIAL_TOKENS))
    tokenizer = _build_tokenizer(vocab, merges, vocab_size)
    heads = hidden_size // 32
    text = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "max_position_embeddings": 32768,
        # The head size is 32; its 16 frequencies are split over time, height and width.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    # The last of the vision layers attends to the whole image.
    vision = {
        "depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "fullatt_block_indexes": [2]
    }  # fmt: skip
    model = _build_model(tokenizer, text, vision)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    _shape_answers(model, tokenizer, vocab_size)
    return _save(path, model, tokenizer)


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing one: who names a built-in model did not ask for files to be written."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _save(path: str | os.PathLike[str], model: Any, tokenizer: Any) -> Path:
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    # In a distributed run transformers lets the first process alone save, and any may be the one to build.
    model.should_save_on_this_rank = lambda *_: True
    with _without_progress_bar():
        model.save_pretrained(folder)
    generation = {
        "bos_token_id": tokenizer.pad_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id],
        "do_sample": False,
    }
    for name, value in (("preprocessor", _PREPROCESSOR_CONFIG), ("generation", generation)):
        (folder / f"{name}_config.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return folder


def _build_model(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    """Make the network; its weights are still to be drawn."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={**vision, "out_hidden_size": text["hidden_size"], "window_size": 112},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        return Qwen2_5_VLForConditionalGeneration(config).eval()


# ---------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------


def _chart_words() -> list[str]:
    """Return every word that chart questions and answers are made of, in a fixed order."""
    charts = ChartDataset(ChartsConfig(num_rows=2000), "train")
    texts = [text for row in map(charts.ask, range(2000)) for text in (row["question"], *row["answers"])]
    texts += [*TITLES, *(label for labels in LABELS for label in labels)]
    texts.append("system user assistant You are a helpful assistant.")
    return sorted({word for text in texts for word in re.findall("[A-Za-z]+", text)})


def _train_bpe(texts: Iterable[str], max_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a byte-level BPE of at most `max_size` tokens; return its vocabulary and merges.

    Given room for it, every word of the texts becomes a token, with a space before it if it had one.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=max_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(texts, trainer=trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _build_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], vocab_size: int) -> Any:
    """Make Qwen's tokenizer class of a BPE, filled up to `vocab_size` with tokens that no text gives."""
    from transformers import Qwen2Tokenizer

    for index in range(len(vocab), vocab_size - len(SPECIAL_TOKENS)):
        vocab[f"<|unused_{index}|>"] = index
    named = ("<|endoftext|>", "<|im_end|>")  # padding and end of turn, as in Qwen
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,  # type: ignore[arg-type]
        pad_token=named[0],
        eos_token=named[1],
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in named],
        model_max_length=32768,
    )


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


def _draw_trainable_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter for training: matrices keep the scale of what passes through, norms are one.

    Text and image enter the language model at one scale, and what its layers add starts smaller.
    """
    import torch

    residual = re.compile(r"(o_proj|down_proj|attn\.proj)\.weight$")
    depth = sum(bool(residual.search(name)) for name, _ in model.named_parameters()) / 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
                continue
            std = 1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5
            if residual.search(name):
                std *= depth**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def _draw_weights(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Fill every parameter: matrices keep the scale of what passes through, norms stay one, biases zero.

    The usual 0.02 would make a network of this width answer the same token to everything.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
            else:
                fan_in = parameter[0].numel()
                std = 1.0 if "embed_tokens" in name else 1.5 / fan_in**0.5
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(values * std)


def _shape_answers(model: Any, tokenizer: Any, vocab_size: int) -> None:
    """Scale the output rows so that answers are words: other bytes are rare, the end token is likely."""
    import torch

    scale = torch.full((vocab_size, 1), 0.2)
    for token, index in tokenizer.get_vocab().items():
        if re.fullmatch(r"Ġ?[A-Za-z0-9]+", token):
            scale[index] = 1.0
    scale[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 1.2
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0 * scale)
