"""Stand-ins that let every pipeline run without a model worth the name. Ships in the package.

* `build_tiny_random_adapter`: a LoRA adapter that changes the answers of a small model.
* `FakeEngine`: an `Engine` without a model: scripted answers, simulated latency and faults.

Models to test with are in `vlmray.builtin`. torch and peft are imported inside the functions, so that
importing this module costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from vlmray.engines.base import (
    Cancelled,
    OnEnd,
    OnLogprobs,
    OnText,
    check_request,
    failed_completion,
    limit_answer,
)
from vlmray.engines.forms import example_of, keeps
from vlmray.errors import OptionError
from vlmray.images.reading import load_image_pil
from vlmray.models.lora import get_default_lora_config_for_qwen_vl
from vlmray.schema import Completion, GenerationRequest, TokenLogprob


def build_tiny_random_adapter(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    seed: int = 0,
    r: int = 4,
    lora_vision: bool = False,
) -> Path:
    """Write a random LoRA adapter for a local base model, strong enough to change its answers.

    Args:
        path: Folder to write; made if missing.
        base: Folder of the model the adapter is for.
        seed: Seeds the weights.
        r: Rank.
        lora_vision: Adapt the vision encoder too.

    Returns:
        The folder, in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForImageTextToText

    config = get_default_lora_config_for_qwen_vl(
        r=r, lora_alpha=2 * r, lora_dropout=0.0, lora_vision=lora_vision
    )
    model = AutoModelForImageTextToText.from_pretrained(base, use_safetensors=True)
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        peft_model = get_peft_model(model, config)
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
    configurations and into other processes like any model: `fake?latency_s=0.01&error_every=7`. Where a form
    is asked for that this text has not, it is a short text of that form. How likely a word was depends on the
    word and its place.

    Args:
        answer: Say this to everything.
        latency_s: Seconds each request takes before its first token.
        token_s: Seconds each token takes; a token is a word.
        load_s: Seconds construction takes.
        fail_load: Raise `RuntimeError` on construction.
        error_every: Answer with an error where the number that ends the request id is a multiple of
            this; 0 is never.
        crash_on: End the process, as a lost node would, at the first request whose id contains this, or
            one of several with `|` between them. With `log`, only once in all (a file beside the log
            remembers); without, every time.
        crash_every_time: With `log` too.
        log: File to which every answered request's id is appended, one line each.
        token_log: The same of every token.
        max_model_len: Most tokens of a prompt and its answer; 0 is no limit.
    """

    def __init__(
        self,
        *,
        answer: str = "",
        latency_s: float = 0.0,
        token_s: float = 0.0,
        load_s: float = 0.0,
        fail_load: bool = False,
        error_every: int = 0,
        crash_on: str = "",
        crash_every_time: bool = False,
        log: str = "",
        token_log: str = "",
        max_model_len: int = 0,
    ) -> None:
        self.waited_s = 0.0
        self.max_model_len = max_model_len or None
        time.sleep(load_s)
        if fail_load:
            raise RuntimeError("the fake engine was told to fail on loading (fail_load=1)")
        self.answer = answer
        self.latency_s = latency_s
        self.token_s = token_s
        self.error_every = error_every
        self.crash_on = crash_on.split("|") if crash_on else []
        self.crash_every_time = crash_every_time
        self.log = log
        self.token_log = token_log

    @classmethod
    def from_model_id(cls, model_id: str) -> FakeEngine:
        """Make the engine of an id such as `fake` or `fake?latency_s=0.01&answer=42`.

        Raises:
            ValueError: Not such an id, an unknown parameter, or a value of the wrong kind.
        """
        return cls(**cls.parse_model_id(model_id))

    @staticmethod
    def parse_model_id(model_id: str) -> dict[str, Any]:
        """Return the engine's parameters by such an id; raises what `from_model_id` does."""
        name, _, query = model_id.partition("?")
        if name != "fake":
            raise OptionError(
                "model_id", f"{model_id!r} is not for the fake engine", "pass fake or fake?name=value&..."
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
        return options

    def prepare(self, requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """Do nothing: there is nothing to make ready."""
        return requests

    def check(self, request: GenerationRequest) -> Completion | None:
        """Compose the answer, and return it if it is an error."""
        completion = self._compose(request)
        return completion if completion.error is not None else None

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        *,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
        cancelled: Cancelled | None = None,
        on_logprobs: OnLogprobs | None = None,
    ) -> list[Completion]:
        """Answer every request, in order, word by word, as long as it is not `cancelled`."""
        completions = []
        for index, request in enumerate(requests):
            is_cancelled = functools.partial(cancelled or _never, index)
            tell = functools.partial(on_text or _ignore, index)
            tell_logprobs = functools.partial(on_logprobs or _ignore, index)
            completions.append(self._answer(request, tell, tell_logprobs, is_cancelled))
            if on_end is not None:
                on_end(index, completions[-1])
        return completions

    def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def _answer(
        self,
        request: GenerationRequest,
        tell: Callable[[str], None],
        tell_logprobs: Callable[[Sequence[TokenLogprob]], None],
        is_cancelled: Callable[[], bool],
    ) -> Completion:
        if not is_cancelled():
            self._read(request)
        completion = self._compose(request)
        words = completion.text.split()
        for place, word in enumerate(words):
            if is_cancelled():
                return dataclasses.replace(
                    completion,
                    text=" ".join(words[:place]),
                    num_completion_tokens=place,
                    finish_reason="cancelled",
                    logprobs=completion.logprobs and completion.logprobs[:place],
                )
            _sleep(self.token_s)
            _append(self.token_log, word)
            if completion.logprobs is not None:
                tell_logprobs([completion.logprobs[place]])
            tell(f" {word}" if place else word)
        return completion

    def _read(self, request: GenerationRequest) -> None:
        """Take the time, and have the accident, that the request is to have."""
        _sleep(self.latency_s)
        if any(part in request.request_id for part in self.crash_on) and self._may_crash():
            os._exit(1)
        _append(self.log, request.request_id)

    def _compose(self, request: GenerationRequest) -> Completion:
        """Return the whole answer."""
        try:
            check_request(request)
            if self.error_every and _trailing_number(request.request_id) % self.error_every == 0:
                raise RuntimeError("the fake engine was told to fail on this request (error_every)")
            prompt = _plain_prompt(request)
            limit = limit_answer(request, len(prompt.split()), self.max_model_len)
            text = self.answer or f"fake {_digest(request, prompt)}"
            if request.form is not None and not keeps(request.form, text):
                text = example_of(request.form)
        except (RuntimeError, ValueError) as error:
            return failed_completion(error)
        words = text.split()
        kept = words[:limit]
        return Completion(
            text=" ".join(kept),
            prompt=prompt,
            num_prompt_tokens=len(prompt.split()),
            num_completion_tokens=len(kept),
            finish_reason="stop" if kept == words else "length",
            logprobs=_logprobs(kept, request.num_logprobs),
        )

    def _may_crash(self) -> bool:
        try:
            if self.log and not self.crash_every_time:
                Path(f"{self.log}.crashed").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


_FAKE_PARAMETERS: dict[str, Callable[[str], Any]] = {
    "answer": str,
    "latency_s": float,
    "token_s": float,
    "load_s": float,
    "fail_load": lambda text: bool(int(text)),
    "error_every": int,
    "crash_on": str,
    "crash_every_time": lambda text: bool(int(text)),
    "log": str,
    "token_log": str,
    "max_model_len": int,
}


def _never(index: int) -> bool:
    return False


def _ignore(index: int, text: object) -> None:
    pass


def _sleep(seconds: float) -> None:
    if seconds:  # even none at all takes a tenth of a millisecond
        time.sleep(seconds)


def _append(log: str, line: str) -> None:
    if not log:
        return
    # One write in append mode: lines of several processes do not mix.
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def _trailing_number(request_id: str) -> int:
    match = re.search(r"(\d+)$", request_id)
    return int(match.group()) if match else 1


def _logprobs(words: Sequence[str], num_likeliest: int | None) -> tuple[TokenLogprob, ...] | None:
    """Say how likely words were: above one half, so each is the likeliest, and each other half as likely."""
    if num_likeliest is None:
        return None
    found = []
    for place, word in enumerate(words):
        chance = 0.5 + hashlib.sha256(f"{place} {word}".encode()).digest()[0] / 512
        token = f" {word}" if place else word
        others = [(f"{token}{'?' * k}", chance if k == 0 else (1 - chance) / 2**k) for k in range(20)]
        top = [
            TokenLogprob(token=text, data=text.encode(), logprob=math.log(share))
            for text, share in others[:num_likeliest]
        ]
        found.append(TokenLogprob(token=token, data=token.encode(), logprob=math.log(chance), top=tuple(top)))
    return tuple(found)


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
