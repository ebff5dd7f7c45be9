"""Stand-ins that let every pipeline run without weights, a GPU or a network. Ships in the package.

* `build_tiny_random_model`: a complete Qwen2.5-VL checkpoint folder of about 4 MB with random weights,
  its own tokenizer and the real chat format. `--model_id tiny-random` is one of these.
* `build_tiny_random_adapter`: a LoRA adapter for it that changes its answers.
* `FakeEngine`: an `Engine` without a model: scripted answers, simulated latency and faults.

torch and transformers are imported inside the builders, so that importing this module costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from vlmray.engines.base import check_request, failed_completion
from vlmray.images import load_image_pil
from vlmray.lora import LANGUAGE_TARGETS
from vlmray.schema import Completion, GenerationRequest

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

WORDS = (
    "system user assistant You are a helpful what is the value of how many which year in chart bar line "
    "color blue red green orange percent share total average highest lowest difference between and answer "
    "question with single word phrase yes no more than less does shown title legend country sales people "
    "growth rate number million billion dollars euros Germany France Japan India China Brazil Canada"
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


def build_tiny_random_model(
    path: str | os.PathLike[str], *, seed: int = 0, vocab_size: int = 512, hidden_size: int = 128
) -> Path:
    """Write a small Qwen2.5-VL checkpoint with random weights that plain transformers loads.

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
    if vocab_size < 300 or hidden_size < 32 or hidden_size % 32:
        raise ValueError(f"need vocab_size >= 300 and 32 | hidden_size, got {vocab_size} and {hidden_size}")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer(vocab_size)
    tokenizer.save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    _build_model(ids, tokenizer, vocab_size, hidden_size, seed).save_pretrained(folder)
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "do_sample": False,
    }
    for name, value in (("preprocessor", _PREPROCESSOR_CONFIG), ("generation", generation)):
        (folder / f"{name}_config.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return folder


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


def _build_tokenizer(vocab_size: int) -> Any:
    """Train a byte-level BPE on the word list and wrap it as Qwen's tokenizer class."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = WORDS.split()
    trained.train_from_iterator([f"{word} {word.capitalize()} {word}" for word in words], trainer=trainer)
    model = json.loads(trained.to_str())["model"]
    vocab: Any = model["vocab"]
    for index in range(len(vocab), vocab_size - len(SPECIAL_TOKENS)):
        vocab[f"<|unused_{index}|>"] = index  # the word list has fewer merges than that
    merges: Any = [tuple(merge) for merge in model["merges"]]
    named = ("<|endoftext|>", "<|im_end|>")  # padding and end of turn, as in Qwen
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        pad_token=named[0],
        eos_token=named[1],
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=[token for token in SPECIAL_TOKENS if token not in named],
        model_max_length=32768,
    )


def _build_model(ids: dict[str, int], tokenizer: Any, vocab_size: int, hidden_size: int, seed: int) -> Any:
    """Make the network: two text layers, three vision layers of which the last attends to the whole image."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads = hidden_size // 32
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
            "max_position_embeddings": 32768,
            # The head size is 32; its 16 frequencies are split over time, height and width.
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": hidden_size,
            "window_size": 112,
            "fullatt_block_indexes": [2],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        model = Qwen2_5_VLForConditionalGeneration(config)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    _shape_answers(model, tokenizer, vocab_size)
    return model.eval()


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


def build_tiny_random_adapter(
    path: str | os.PathLike[str], base: str | os.PathLike[str], *, seed: int = 0, r: int = 4
) -> Path:
    """Write a random LoRA adapter for a local base model, strong enough to change its answers.

    Args:
        path: Folder to write; made if missing.
        base: Folder of the model the adapter is for.
        seed: Seeds the weights.
        r: Rank.

    Returns:
        The folder, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base, use_safetensors=True)
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        peft_model = get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=LANGUAGE_TARGETS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(values * parameter.shape[1] ** -0.5)
    peft_model.save_pretrained(str(path), safe_serialization=True)
    return Path(path)


class FakeEngine:
    """An engine without a model, for tests of what lies around one.

    By default a text depends on the question, the pixels and the adapter, so an answer at another
    request's place shows. It is made from an id with parameters, so that it passes through
    configurations and into other processes like any model: `fake?latency_s=0.01&error_every=7`.

    Args:
        answer: Say this to everything.
        latency_s: Seconds each request takes.
        load_s: Seconds construction takes.
        fail_load: Raise `RuntimeError` on construction.
        error_every: Answer with an error where the number that ends the request id is a multiple of
            this; 0 is never.
        crash_on: End the process, as a lost node would, at the first request whose id contains this. With
            `log`, only once in all (a file beside the log remembers); without, every time.
        log: File to which every answered request's id is appended, one line each.
    """

    def __init__(
        self,
        *,
        answer: str = "",
        latency_s: float = 0.0,
        load_s: float = 0.0,
        fail_load: bool = False,
        error_every: int = 0,
        crash_on: str = "",
        log: str = "",
    ) -> None:
        time.sleep(load_s)
        if fail_load:
            raise RuntimeError("the fake engine was told to fail on loading (fail_load=1)")
        self.answer = answer
        self.latency_s = latency_s
        self.error_every = error_every
        self.crash_on = crash_on
        self.log = log

    @classmethod
    def from_model_id(cls, model_id: str) -> FakeEngine:
        """Make the engine of an id such as `fake` or `fake?latency_s=0.01&answer=42`.

        Raises:
            ValueError: Not such an id, an unknown parameter, or a value of the wrong kind.
        """
        name, _, query = model_id.partition("?")
        if name != "fake":
            raise ValueError(
                f"--model_id {model_id!r} is not for the fake engine; pass fake or fake?name=value&..."
            )
        options: dict[str, Any] = {}
        for key, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)):
            if key not in _FAKE_PARAMETERS:
                known = ", ".join(_FAKE_PARAMETERS)
                raise ValueError(f"unknown parameter {key!r} in --model_id {model_id}; known: {known}")
            try:
                options[key] = _FAKE_PARAMETERS[key](value)
            except ValueError as error:
                raise ValueError(f"parameter {key!r} in --model_id has value {value!r}: {error}") from error
        return cls(**options)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Answer every request, in order."""
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def _answer(self, request: GenerationRequest) -> Completion:
        time.sleep(self.latency_s)
        if self.crash_on and self.crash_on in request.request_id and self._may_crash():
            os._exit(1)
        self._append_log(request.request_id)
        try:
            check_request(request)
            if self.error_every and _trailing_number(request.request_id) % self.error_every == 0:
                raise RuntimeError("the fake engine was told to fail on this request (error_every)")
        except (RuntimeError, ValueError) as error:
            return failed_completion(error)
        prompt = _plain_prompt(request)
        words = (self.answer or f"fake {_digest(request, prompt)}").split()
        kept = words[: request.max_new_tokens]
        return Completion(
            text=" ".join(kept),
            prompt=prompt,
            num_prompt_tokens=len(prompt.split()),
            num_completion_tokens=len(kept),
            finish_reason="stop" if kept == words else "length",
        )

    def _may_crash(self) -> bool:
        try:
            if self.log:
                Path(f"{self.log}.crashed").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _append_log(self, request_id: str) -> None:
        if not self.log:
            return
        # One write in append mode: lines of several processes do not mix.
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, f"{request_id}\n".encode())
        finally:
            os.close(descriptor)


_FAKE_PARAMETERS: dict[str, Callable[[str], Any]] = {
    "answer": str,
    "latency_s": float,
    "load_s": float,
    "fail_load": lambda text: bool(int(text)),
    "error_every": int,
    "crash_on": str,
    "log": str,
}


def _trailing_number(request_id: str) -> int:
    match = re.search(r"(\d+)$", request_id)
    return int(match.group()) if match else 1


def _plain_prompt(request: GenerationRequest) -> str:
    """Write the messages as text, `<image>` at each image's place."""
    lines = []
    for message in request.messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", "<image>") for part in content]
        lines.append(f"{message['role']}: {' '.join(parts)}")
    return "\n".join(lines)


def _digest(request: GenerationRequest, prompt: str) -> str:
    """Hash what an answer depends on; the seed and the id only where the request samples."""
    digest = hashlib.sha256(f"{prompt}\0{request.adapter}".encode())
    for image in map(load_image_pil, request.images):
        digest.update(f"{image.size}".encode() + image.tobytes())
    if request.temperature > 0:
        digest.update(f"{request.seed}\0{request.request_id}".encode())
    return digest.hexdigest()[:8]
