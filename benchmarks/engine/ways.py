"""One way to answer requests, in a process of its own, so that its memory and settings are its own too.

    python -m benchmarks.engine.ways engine work.json

`benchmarks.engine.throughput` starts these. Each line on the standard input is a turn: all requests are
answered once, and a JSON line tells how long it took. Standard library only, until a way loads what it
needs: vLLM may live in another environment.
"""

from __future__ import annotations

import base64
import importlib
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Answer = Callable[[], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A request, formatted for the model."""

    prompt: str
    messages: list[dict[str, Any]]
    images: list[bytes]
    max_new_tokens: int


def main() -> None:
    """Load a way, then answer as often as asked."""
    name, path = sys.argv[1:]
    work = json.loads(Path(path).read_text())
    questions = [
        Question(**{**each, "images": [base64.b64decode(image) for image in each["images"]]})
        for each in work["questions"]
    ]
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes elsewhere
    way = {
        "one by one": lambda: generate_way(work, questions, 1),
        "fixed batches": lambda: generate_way(work, questions, work["fixed_batch_size"]),
        "engine": lambda: EngineWay(work, questions),
        "vllm": lambda: vllm_way(work, questions),
    }[name]()
    for line in sys.stdin:
        if line.strip() == "count":
            print(json.dumps({"gflop": way.count() / 1e9}), file=output)  # type: ignore[attr-defined]
            continue
        run = way.answer_first if line.strip() == "first" else way  # type: ignore[attr-defined]
        started = time.perf_counter()
        texts = run()
        print(
            json.dumps(
                {"seconds": time.perf_counter() - started, "peak_gib": peak_gib(work), "texts": texts}
            ),
            file=output,
        )


def peak_gib(work: dict[str, Any]) -> float:
    """Return the most memory that this process had, of the GPU where it works on one."""
    if work["device"] == "cuda":
        return float(importlib.import_module("torch").cuda.max_memory_allocated()) / 2**30
    status = Path("/proc/self/status").read_text()  # getrusage counts the parent's memory in
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def generate_way(work: dict[str, Any], questions: Sequence[Question], batch_size: int) -> Answer:
    """Answer as a script over transformers does: batch after batch, in order, everything padded."""
    import torch

    from vlmray.models.loading import load_qwen_vl_model_and_processor

    torch.set_num_threads(work["num_threads"])
    model, processor = load_qwen_vl_model_and_processor(work["model_id"], dtype=work["dtype"])
    if work["forced"]:
        model.generation_config.eos_token_id = None
    return lambda: answer_plainly(model, processor, questions, batch_size)


def answer_plainly(model: Any, processor: Any, questions: Sequence[Question], batch_size: int) -> list[str]:
    """Answer with `generate` on fixed batches in order, padded on the left; cut each to its own length."""
    import torch

    from vlmray.images.decoding import decode_image

    processor.tokenizer.padding_side = "left"
    texts: list[str] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        images = [decode_image(data) for question in batch for data in question.images]
        inputs = processor(
            text=[question.prompt for question in batch],
            images=images or None,
            return_tensors="pt",
            padding=True,
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=max(question.max_new_tokens for question in batch)
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        new = [row[: each.max_new_tokens] for row, each in zip(new, batch, strict=True)]
        texts += processor.batch_decode(new, skip_special_tokens=True)
    return texts


class EngineWay:
    """Answer with the engine of vlmray; `count` tells what work that is at least.

    `answer_first` answers the first question of each image alone.
    """

    def __init__(self, work: dict[str, Any], questions: Sequence[Question]) -> None:
        from vlmray.config import EngineConfig
        from vlmray.engines.transformers.engine import TransformersEngine
        from vlmray.schema import GenerationRequest

        self.engine = TransformersEngine.from_pretrained(
            work["model_id"],
            EngineConfig(dtype=work["dtype"]),
            batch_size=work["batch_size"],
            num_threads=work["num_threads"],
        )
        if work["forced"]:
            self.engine.model.generation_config.eos_token_id = None
        self.requests = [
            GenerationRequest(
                request_id=str(number),
                messages=question.messages,
                images=question.images,
                max_new_tokens=question.max_new_tokens,
            )
            for number, question in enumerate(questions)
        ]

        first = {tuple(request.images): request for request in reversed(self.requests)}
        self.first = list(first.values())[::-1]

    def __call__(self) -> list[str]:
        return self._answer(self.requests)

    def answer_first(self) -> list[str]:
        return self._answer(self.first)

    def _answer(self, requests: Sequence[Any]) -> list[str]:
        return [completion.text for completion in self.engine.generate(requests)]

    def count(self) -> float:
        """Return the floating-point operations that cannot be avoided."""
        from benchmarks.common.limit import count_work

        return count_work(self.engine, self.requests)


def vllm_way(work: dict[str, Any], questions: Sequence[Question]) -> Answer:
    """Answer with vLLM, all requests at once, as it likes them."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=work["model_id"],
        dtype=work["dtype"],
        max_model_len=4096,
        enforce_eager=work["device"] == "cpu",
        limit_mm_per_prompt={"image": max(len(question.images) for question in questions)},
        generation_config="vllm",
        seed=0,
    )
    turns = itertools.count()

    def answer() -> list[str]:
        # It remembers images over turns by their content; one pixel makes those of each turn new to it.
        turn = next(turns)

        def decode(data: bytes) -> Any:
            image = Image.open(io.BytesIO(data)).convert("RGB")
            image.putpixel((0, 0), (turn, turn, turn))
            return image

        prompts = [
            {"prompt": each.prompt, "multi_modal_data": {"image": [decode(data) for data in each.images]}}
            for each in questions
        ]
        settings = [
            SamplingParams(temperature=0, max_tokens=each.max_new_tokens, ignore_eos=work["forced"])
            for each in questions
        ]
        outputs = llm.generate(prompts, settings, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    return answer


if __name__ == "__main__":
    main()
