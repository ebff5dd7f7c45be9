"""Do two engines write the same texts? Base and adapter, alone and mixed, over the built-in charts.

    python -m benchmarks.engine.agreement --rows 300

In an environment that has vLLM. Every disagreement is shown with the scores that the model gives, in a plain
forward pass, to the two tokens at which the texts part: a near tie is rounding, anything else a defect.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from vlmray.config import InferConfig
from vlmray.dataset.rows import read_chunk
from vlmray.dataset.selection import open_selection
from vlmray.engines import build_engine
from vlmray.engines.fake import build_tiny_random_adapter
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.images.decoding import decode_image
from vlmray.inference.stages import Task, make_requests, prepare_rows
from vlmray.models.adapters import use_adapters
from vlmray.models.prompts import template_options
from vlmray.models.source import resolve_model_id
from vlmray.schema import GenerationRequest

LORA = "lora"


def main() -> None:
    """Ask both engines, and say where they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--model_id", default="builtin")
    parser.add_argument("--adapter", help="folder of a LoRA adapter; default: random weights")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model_id = resolve_model_id(options.model_id)
        adapter = options.adapter or str(build_tiny_random_adapter(folder, model_id, r=8))
        compare(model_id, adapter, charts(options.rows, options.max_new_tokens))


def charts(num_rows: int, max_new_tokens: int) -> list[GenerationRequest]:
    """Return requests about the built-in charts."""
    name = f"charts?num_rows={num_rows}&seed=23"
    config = InferConfig(model_id="builtin", dataset_name=name, sample_slices="[:]")
    found = open_selection(config, "test", "[:]")
    spec = found.spec
    task = Task(prompt_template=spec.prompt_template, metric=spec.metric, max_new_tokens=max_new_tokens)
    rows = read_chunk(found.source, spec, "test", found.selected, 0, len(found.selected))
    return make_requests(prepare_rows(rows, task, keep_images=False), task)


def compare(model_id: str, adapter: str, requests: Sequence[GenerationRequest]) -> None:
    """Print a table of agreement, and one JSON line."""
    plain = build_engine(engine="transformers", model_id=model_id, dtype="float32")
    vllm: Any = build_engine(
        engine="vllm", model_id=model_id, dtype="float32", num_threads=1, adapters=[adapter], max_adapters=1
    )
    assert isinstance(plain, TransformersEngine)
    by_adapter = {
        name: [dataclasses.replace(request, adapter=name) for request in requests] for name in (None, LORA)
    }
    try:
        for engine in (plain, vllm):
            engine.load_adapter(LORA, adapter)
        answers = {
            engine: {name: texts(engine, asked) for name, asked in by_adapter.items()}
            for engine in (plain, vllm)
        }
        pairs = [request for both in zip(*by_adapter.values(), strict=True) for request in both]
        mixed = texts(vllm, pairs)
    finally:
        vllm.close()
    alone = [text for both in zip(*answers[vllm].values(), strict=True) for text in both]
    report: dict[str, Any] = {"rows": len(requests)}
    for name, asked in by_adapter.items():
        differ = [
            parting(plain, request, first, second)
            for request, first, second in zip(asked, answers[plain][name], answers[vllm][name], strict=True)
            if first != second
        ]
        report[name or "base"] = share(len(asked) - len(differ), len(asked)) | {"gaps": differ}
    same = sum(a == b for a, b in zip(alone, mixed, strict=True))
    report["mixed as alone"] = share(same, len(alone))
    report["changed by lora"] = share(
        sum(a != b for a, b in zip(*answers[plain].values(), strict=True)), len(requests)
    )
    for what, found in report.items():
        print(f"{what:16} {found}")
    print(json.dumps(report))


def texts(engine: Any, requests: Sequence[GenerationRequest]) -> list[str]:
    completions = engine.generate(requests)
    assert not any(completion.error for completion in completions), completions
    return [completion.text for completion in completions]


def share(part: int, whole: int) -> dict[str, Any]:
    return {"same": part, "of": whole, "share": round(part / whole, 4)}


def parting(engine: TransformersEngine, request: GenerationRequest, first: str, second: str) -> float:
    """Print where two texts part, and return how far apart the model's scores of the two tokens are."""
    tokenizer = engine.processor.tokenizer
    ends = [tokenizer.eos_token_id]
    one, other = (tokenizer(text)["input_ids"] + ends for text in (first, second))
    place = next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    prompt = engine.prompts.render(request.messages, **template_options(engine.processor, request))
    images = [decode_image(image) if isinstance(image, bytes) else image for image in request.images]
    row = engine.prompts.encode(prompt, images)
    length = row["input_ids"].shape[1]
    said = {
        "input_ids": torch.tensor([one[:place]], dtype=torch.long),
        "attention_mask": torch.ones(1, place),
    }
    for key, value in row.items():
        if value.shape == (1, length):
            more = said.get(key, torch.zeros(1, place)).to(value.dtype)
            row[key] = torch.cat([value, more], dim=1)
    adapter = engine._adapters[request.adapter]
    with torch.inference_mode(), use_adapters([adapter]):
        scores = engine.model(**row).logits[0, -1]
    gap = float(abs(scores[one[place]] - scores[other[place]]))
    print(
        f"{request.request_id} {request.adapter or 'base'}: {first!r} or {second!r}, scores {gap:.2e} apart"
    )
    return gap


if __name__ == "__main__":
    main()
