"""What do forms of answers cost, in speed and in right answers? On built-in charts, with any model.

    python -m benchmarks.engine.forms --num_rows 200 --repeats 5
    python -m benchmarks.engine.forms --engine vllm --num_rows 40 --repeats 1

Questions whose answers are whole numbers, with a JSON schema, an expression and choices that these keep, and
with an object that holds more. Speed is in tokens: each form is measured beside free text of as many tokens
for each row, in turn. Answers are checked against their form, and scores are compared with those of free
text. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common.requests import read_requests
from vlmray import metrics
from vlmray.builtin.charts import ChartsConfig
from vlmray.builtin.models import trained_charts
from vlmray.config import InferConfig
from vlmray.dataset.rows import read_rows
from vlmray.dataset.selection import open_selection
from vlmray.engines import build_engine
from vlmray.engines.base import Engine
from vlmray.engines.forms import keeps
from vlmray.metrics.significance import paired_difference
from vlmray.schema import Completion, Form, GenerationRequest

_NUMERIC = "count,value_by_label,value_by_colour,highest,lowest"
_OBJECT = {
    "type": "object",
    "properties": {
        "answer": {"type": "integer", "minimum": 0, "maximum": 999},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "note": {"type": "string", "maxLength": 10},
    },
    "required": ["answer", "colours", "note"],
    "additionalProperties": False,
}
FORMS = {
    "JSON, an integer": Form(schema='{"type": "integer"}'),
    "expression": Form(regex="[0-9]{1,4}"),
    "1,000 choices": Form(choices=tuple(map(str, range(1000)))),
    "JSON, an object": Form(schema=json.dumps(_OBJECT)),
}


def main() -> None:
    """Measure all forms and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_id", default="builtin")
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--num_rows", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    requests, answers, images = charts(options.num_rows)
    engine = build_engine(
        engine=options.engine, model_id=options.model_id, dtype="float32", batch_size=options.batch_size
    )
    try:
        free = engine.generate(requests)
        scores = [right(each.text, answer) for each, answer in zip(free, answers, strict=True)]
        share = sum(scores) / len(scores)
        print(f"{'form':18} {'kept':>9}  {'speed':>5}  right, beside {share:.3f} of free text")
        found = {name: measure(engine, requests, form, options.repeats) for name, form in FORMS.items()}
        for name, (completions, figures) in found.items():
            formed = [right(each.text, answer) for each, answer in zip(completions, answers, strict=True)]
            lost = paired_difference(scores, formed, images)
            figures |= {"right": sum(formed) / len(formed), "difference": [lost.mean, lost.low, lost.high]}
            told = f"{lost.mean:+.3f} ({lost.low:+.3f} to {lost.high:+.3f})"
            print(f"{name:18} {figures['num_kept']:4}/{len(formed)}  {figures['speed']:5.2f}  {told}")
    finally:
        engine.close()
    print(json.dumps({**vars(options), "forms": {name: figures for name, (_, figures) in found.items()}}))


def charts(num_rows: int) -> tuple[list[GenerationRequest], list[str], list[Any]]:
    """Return questions about numbers, their answers, and what tells their images apart."""
    trained = trained_charts()
    name = ChartsConfig(
        num_rows=num_rows, seed=trained.seed + 1000, kind=",".join(trained.kinds), style=trained.style,
        family=_NUMERIC,
    ).name  # fmt: skip
    config = InferConfig(model_id="builtin", dataset_name=name, sample_slices="[:]", max_new_tokens=80)
    asked = open_selection(config, config.dataset_split, config.sample_slices)
    rows = read_rows(asked.source, asked.spec, asked.split, asked.selected)
    images = [tuple(row["images"]) for row in rows]
    return read_requests(config), [row["answers"][0] for row in rows], images


def right(text: str, answer: str) -> float:
    """Score an answer, or that in the field of an object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    said = value["answer"] if isinstance(value, dict) else value
    return metrics.score("exact_match", str(said), [answer]).value


def measure(
    engine: Engine, requests: Sequence[GenerationRequest], form: Form, repeats: int
) -> tuple[list[Completion], dict[str, Any]]:
    """Answer with a form, and compare the time with that of free text of as many tokens."""
    formed = [dataclasses.replace(each, form=form) for each in requests]
    completions = engine.generate(formed)  # compiles the form
    plain = [
        dataclasses.replace(each, max_new_tokens=found.num_completion_tokens, ignore_eos=True)
        for each, found in zip(requests, completions, strict=True)
    ]
    engine.generate(plain)
    ratios = []
    for number in range(repeats):
        both = (plain, formed) if number % 2 else (formed, plain)
        elapsed_s = {id(part): _time(engine, part) for part in both}
        ratios.append(elapsed_s[id(plain)] / elapsed_s[id(formed)])
    return completions, {
        "num_kept": sum(keeps(form, each.text) for each in completions),
        "num_tokens": sum(each.num_completion_tokens for each in completions),
        "speed": statistics.median(ratios),
        "speeds": sorted(ratios),
    }


def _time(engine: Engine, requests: Sequence[GenerationRequest]) -> float:
    started = time.perf_counter()
    engine.generate(requests)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
