"""One way to answer requests with vLLM and without vlmray's engine, in a process of its own.

    python -m benchmarks.engine.vllm_ways chat work.json

`benchmarks.engine.vllm_speed` starts these. The output is one JSON object: seconds until the model was
loaded, seconds of answering, and the answers.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

Questions = list[dict[str, Any]]

_LOADED = "VLMRAY_BENCHMARK_LOADED"
"""Names the file that says when a model was loaded."""


def main() -> None:
    """Load, answer once, and say how long it took."""
    started = time.time()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    name, path = sys.argv[1:]
    work = json.loads(Path(path).read_text())
    loaded, texts = {"chat": chat_way, "ray": ray_way}[name](work["engine_args"], work["questions"])
    found = {"load_s": loaded - started, "answer_s": time.time() - loaded, "texts": texts}
    print(json.dumps(found), file=output, flush=True)


def chat_way(engine_args: dict[str, Any], questions: Questions) -> tuple[float, list[str]]:
    """Answer the whole list by one call of `LLM.chat`; return when the model was there, and the texts."""
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_args)
    loaded = time.time()
    settings = [SamplingParams(**_settings(each)) for each in questions]
    outputs = llm.chat(list(map(_messages_with_image, questions)), settings, use_tqdm=False)
    return loaded, [output.outputs[0].text for output in outputs]


def ray_way(engine_args: dict[str, Any], questions: Questions) -> tuple[float, list[str]]:
    """Answer by Ray Data's pipeline over vLLM, as its documentation has it for images."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    hook = {"worker_process_setup_hook": "benchmarks.engine.vllm_ways.note_loading"}
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env=hook)
    model = engine_args.pop("model")
    config = vLLMEngineProcessorConfig(
        model_source=model, engine_kwargs=engine_args, batch_size=32, concurrency=1, accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]}, prepare_multimodal_stage={"enabled": True},
    )  # fmt: skip
    process = build_processor(
        config,
        preprocess=lambda row: {
            "number": row["number"], "messages": _messages_with_url(row), "sampling_params": _settings(row)
        },
        postprocess=lambda row: {"number": row["number"], "text": row["generated_text"]},
    )  # fmt: skip
    rows = [{"number": number, **each} for number, each in enumerate(questions)]
    found = process(ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // 32))).take_all()
    texts = {row["number"]: row["text"] for row in found}
    return float(Path(os.environ[_LOADED]).read_text()), [texts[number] for number in range(len(rows))]


def note_loading() -> None:
    """Have Ray's stage write when its model was loaded."""
    from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

    load = vLLMEngineStageUDF.__init__

    def load_and_note(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        Path(os.environ[_LOADED]).write_text(str(time.time()))

    vLLMEngineStageUDF.__init__ = load_and_note


def _settings(question: dict[str, Any]) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": question["max_tokens"], "ignore_eos": True}


def _messages_with_image(question: dict[str, Any]) -> list[dict[str, Any]]:
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(question["image"])))
    return _messages(question, {"type": "image_pil", "image_pil": image})


def _messages_with_url(question: dict[str, Any]) -> list[dict[str, Any]]:
    url = f"data:image/png;base64,{question['image']}"
    return _messages(question, {"type": "image_url", "image_url": {"url": url}})


def _messages(question: dict[str, Any], image: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image, {"type": "text", "text": question["text"]}]}]


if __name__ == "__main__":
    main()
