"""One way to answer requests with vLLM and without vlmray's engine, in a process of its own.

    python -m benchmarks.engine.vllm_ways chat work.json

`chat` is vLLM's own `LLM.chat` on the whole list, `ray-data-llm` the processor of `ray.data.llm`, for which
Ray is told of eight CPUs: each of its stages holds one.

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


def main() -> None:
    """Load, answer once, and say how long it took."""
    started = time.time()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    name, path = sys.argv[1:]
    work = json.loads(Path(path).read_text())
    way = {"chat": chat_way, "ray-data-llm": ray_data_way}[name]
    answer_s, texts = way(work["engine_args"], work["questions"])
    found = {"load_s": time.time() - started - answer_s, "answer_s": answer_s, "texts": texts}
    print(json.dumps(found), file=output, flush=True)


def chat_way(engine_args: dict[str, Any], questions: Questions) -> tuple[float, list[str]]:
    """Answer the whole list by one call of `LLM.chat`; return how long it took, and the texts."""
    from vllm import LLM, SamplingParams

    llm = LLM(**engine_args)
    loaded = time.time()
    settings = [SamplingParams(**_settings(each)) for each in questions]
    outputs = llm.chat(list(map(_messages_with_image, questions)), settings, use_tqdm=False)
    return time.time() - loaded, [output.outputs[0].text for output in outputs]


def ray_data_way(engine_args: dict[str, Any], questions: Questions) -> tuple[float, list[str]]:
    """Answer the whole list by Ray's own pipeline; return what it took above one row, and the texts.

    Its engine is loaded while the pipeline runs: for one row, with cold files, for all, and for one again.
    """
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.init(num_cpus=8, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    engine_kwargs = dict(engine_args)
    config = vLLMEngineProcessorConfig(
        model_source=engine_kwargs.pop("model"), engine_kwargs=engine_kwargs,
        placement_group_config={"bundles": [{"CPU": 1}]},
        prepare_multimodal_stage={"enabled": True, "chat_template_content_format": "openai"},
    )  # fmt: skip

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{row['image']}"}}
        return {"messages": _messages(row, image), "sampling_params": _settings(row)}

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        return {"place": row["place"], "text": row["generated_text"]}

    def run(rows: Questions) -> tuple[float, list[dict[str, Any]]]:
        started = time.time()
        found = build_processor(config, ask, keep)(ray.data.from_items(rows)).take_all()
        return time.time() - started, found

    rows = [{**question, "place": place} for place, question in enumerate(questions)]
    run(rows[:1])
    all_s, found = run(rows)
    alone_s, _ = run(rows[:1])
    texts = [row["text"] for row in sorted(found, key=lambda row: row["place"])]
    return all_s - alone_s, texts


def _settings(question: dict[str, Any]) -> dict[str, Any]:
    return {"temperature": 0.0, "max_tokens": question["max_tokens"], "ignore_eos": True}


def _messages_with_image(question: dict[str, Any]) -> list[dict[str, Any]]:
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(question["image"])))
    return _messages(question, {"type": "image_pil", "image_pil": image})


def _messages(question: dict[str, Any], image: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [image, {"type": "text", "text": question["text"]}]}]


if __name__ == "__main__":
    main()
