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


def main() -> None:
    """Load, answer once, and say how long it took."""
    started = time.time()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    name, path = sys.argv[1:]
    work = json.loads(Path(path).read_text())
    loaded, texts = {"chat": chat_way}[name](work["engine_args"], work["questions"])
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
