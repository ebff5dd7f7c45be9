"""Does the engine write what plain `generate` writes, on this device and in each precision?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.setting import Figures, Setting
from vlmray.builtin.models import BUILTIN
from vlmray.config import EngineConfig
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.images.decoding import decode_image
from vlmray.models.source import resolve_model_id
from vlmray.schema import GenerationRequest

ROOT = Path(__file__).parents[2]
_CONTRACT = [
    f"tests/engines/test_{part}.py" for part in ("contract", "shared_images", "adapters", "streaming")
]
CHARTS = "charts?kind=bar&style=plain&num_rows=512&questions_per_image=4&seed=3"


def measure(setting: Setting) -> Figures:
    """Run the contract tests in float32, and count equal texts of the built-in model in all precisions."""
    num_passed, failed = _run_contract_tests(setting.scale.contract)
    yield "contract_tests_passed", num_passed
    yield "contract_tests_failed", failed
    folder = resolve_model_id(BUILTIN)
    charts = Setting(scale_name=setting.scale_name, processor=folder, dataset_name=CHARTS, scratch="")
    requests = charts.read_requests(setting.scale.num_exact, forced=False)
    for dtype in ("float32", "bfloat16", "float16"):
        engine = TransformersEngine.from_pretrained(folder, EngineConfig(dtype=dtype))
        texts = [completion.text for completion in engine.generate(requests)]
        gaps = [
            gap
            for request, text in zip(requests, texts, strict=True)
            if (gap := _find_gap(engine.model, engine.processor, request, text)) is not None
        ]
        yield f"{dtype}_equal_texts", 1 - len(gaps) / len(requests)
        if gaps:
            yield f"{dtype}_logit_gaps_at_first_difference", gaps
        engine.close()
    if failed or not num_passed:
        raise RuntimeError(f"{num_passed} contract tests passed, {len(failed)} failed; see the log")


def _run_contract_tests(expression: str) -> tuple[int, list[str]]:
    """Run the tests that hold for every engine; return how many passed, and the names of the others.

    Where there is a GPU they run on it.
    """
    command = [
        sys.executable, "-m", "pytest", *_CONTRACT, "-q", "-p", "no:cacheprovider",
        *(["-k", expression] if expression else []),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout)
    passed = re.search(r"(\d+) passed", done.stdout)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return int(passed[1]) if passed else 0, failed


@torch.inference_mode()
def _find_gap(model: Any, processor: Any, request: GenerationRequest, text: str) -> float | None:
    """Return how far plain `generate`'s token was ahead of the next where its text leaves `text`.

    None where the texts are equal. A gap within the rounding of the precision is a near tie.
    """
    prompt = processor.apply_chat_template(request.messages, add_generation_prompt=True)
    images = [decode_image(image) for image in request.images if isinstance(image, bytes)]
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt").to(model.device)
    output = model.generate(
        **inputs, do_sample=False, max_new_tokens=request.max_new_tokens,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    for end, logits in enumerate(output.logits, start=1):
        written = processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        last = end == len(tokens)
        if not text.startswith(written) or (last and written != text):
            best, second = logits[0].float().topk(2).values.tolist()
            return best - second
    return None
