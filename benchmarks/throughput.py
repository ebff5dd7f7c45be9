"""How close does the engine come to what the machine can do? The same requests in four ways, and the limit.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --model_id random-132m --processor path/to/Qwen2.5-VL-7B-Instruct \\
        --dataset_name path/to/ChartQA --num_rows 48 --forced

(a) one sample after the other through transformers' `generate`; (b) `generate` on fixed batches, padded, as
evaluation harnesses do; (c) the engine of vlmray; (d) the whole pipeline with it, reading and writing
included. All see the rows in the order of the dataset, in one process and precision, in turn, `--repeats`
times. (d) counts from its first third of finished rows to its last, so it leaves out the start of Ray and the
loading of the model.

The limit is the floating-point work that cannot be avoided, over the rate of this machine's matrix products
in the same run: each distinct image goes through the vision tower once, each distinct beginning (system
prompt and image) through the language model once, each question and answer token once, and only answer
tokens need logits. A token costs two operations for each weight of the linear layers it passes, and
4 x width x context for attention. Normalisation, softmax, image resizing and all else count as free.

`random-132m` is a Qwen2.5-VL with random weights and the tokenizer and image processor of `--processor`.
`--forced` gives each answer as many tokens as the first accepted answer has, whatever the model says.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from overhead import measure_pipeline
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlmray import cluster, stages
from vlmray.config import InferConfig
from vlmray.engines.transformers import TransformersEngine
from vlmray.images import decode_image
from vlmray.inference import plan_inference
from vlmray.schema import GenerationRequest
from vlmray.small_models import resolve_model_id

RANDOM = "random-132m"
WAYS = ("one by one", "fixed batches", "engine", "pipeline")


def main() -> None:
    """Measure, and print a table and one JSON line."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        if options.model_id == RANDOM:
            options.model_id = build_random_model(Path(options.processor), Path(folder) / "model")
        plan = plan_inference(infer_config(options, f"{folder}/plan"))
        rows = stages.prepare_rows(
            stages.read_rows(plan.source, plan.spec, options.dataset_split, plan.selected), plan.task
        )
        engine = TransformersEngine.from_pretrained(
            resolve_model_id(options.model_id),
            dtype="float32",
            batch_size=options.batch_size,
            num_threads=options.num_threads,
        )
        requests = make_requests(options, engine, rows, plan.task)
        sides: dict[str, Callable[[], Any]] = {
            "one by one": lambda: generate_batches(engine, requests, 1),
            "fixed batches": lambda: generate_batches(engine, requests, options.fixed_batch_size),
            "engine": lambda: engine.generate(requests),
        }
        rates: dict[str, list[float]] = {name: [] for name in WAYS}
        memory, products = {}, []
        for side in sides.values():
            side()  # the first pass sets things up
        for repeat in range(options.repeats):
            products.append(measure_products())
            for name, side in sides.items():
                started = time.perf_counter()
                side()
                rates[name].append(len(requests) / (time.perf_counter() - started))
                memory.setdefault(name, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
            if options.pipeline:
                cluster.connect("ERROR")
                replicas = cluster.plan_replicas(None, None)
                run = plan_inference(infer_config(options, f"{folder}/{repeat}"))
                rates["pipeline"].append(measure_pipeline(run, replicas))
        work = count_work(engine, requests)
    limit = [len(requests) / (work / product) for product in products]
    print_table(options, rates, limit, work, products, memory)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_id", default="builtin", help=f"a model, or {RANDOM}")
    parser.add_argument("--processor", help=f"folder of tokenizer, processor and config, for {RANDOM}")
    parser.add_argument(
        "--dataset_name", default="charts?kind=bar&style=plain&num_rows=512&questions_per_image=4&seed=3"
    )
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--num_rows", type=int, default=256)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--forced", action="store_true")
    parser.add_argument("--batch_size", type=int, default=16, help="of the engine, at most")
    parser.add_argument("--fixed_batch_size", type=int, default=8, help="of (b)")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pipeline", action="store_true", help="measure (d) too; not with --forced")
    options = parser.parse_args()
    if options.model_id == RANDOM and not options.processor:
        parser.error(f"--model_id {RANDOM} needs --processor")
    if options.forced and options.pipeline:
        parser.error("--pipeline answers as the model does, --forced does not")
    return options


def infer_config(options: argparse.Namespace, output_dir: str) -> InferConfig:
    """Describe the run of the pipeline."""
    return InferConfig(
        model_id=options.model_id, dataset_name=options.dataset_name, dataset_split=options.dataset_split,
        sample_slices=f"[:{options.num_rows}]", output_dir=output_dir, dtype="float32",
        max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, output_format="parquet",
        log_level="ERROR",
    )  # fmt: skip


def make_requests(
    options: argparse.Namespace, engine: TransformersEngine, rows: Sequence[dict[str, Any]], task: Any
) -> list[GenerationRequest]:
    """Make requests; forced ones end after as many tokens as their answer has."""
    requests = stages.make_requests(rows, task)
    if not options.forced:
        return requests
    engine.model.generation_config.eos_token_id = None
    tokenizer = engine.processor.tokenizer
    lengths = [len(tokenizer(row["answers"][0])["input_ids"]) + 1 for row in rows]
    return [replace(each, max_new_tokens=n) for each, n in zip(requests, lengths, strict=True)]


def generate_batches(
    engine: TransformersEngine, requests: Sequence[GenerationRequest], batch_size: int
) -> None:
    """Answer as a script over transformers does: batch after batch, in order, everything padded."""
    processor, model = engine.processor, engine.model
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        texts = [processor.apply_chat_template(r.messages, add_generation_prompt=True) for r in batch]
        images = [decode_image(data) for request in batch for data in request.images]
        inputs = processor(text=texts, images=images or None, return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(
                **inputs, do_sample=False, max_new_tokens=max(r.max_new_tokens for r in batch)
            )
        processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def measure_products() -> float:
    """Return the rate of large matrix products, operations per second: the best of several."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def count_work(engine: TransformersEngine, requests: Sequence[GenerationRequest]) -> float:
    """Return the floating-point operations that cannot be avoided; the module's docstring has the formula."""
    model, config = engine.model, engine.model.config
    text, vision = config.text_config, config.vision_config
    merge = vision.spatial_merge_size**2
    in_blocks = num_weights(model.model.visual.blocks) + num_weights(model.model.visual.patch_embed)
    in_merger = num_weights(model.model.visual.merger)
    in_text = num_weights(model.model.language_model.layers)
    head = model.lm_head.weight.numel()
    width = (
        text.num_hidden_layers
        * text.num_attention_heads
        * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    )
    window = (vision.window_size // vision.patch_size) ** 2
    num_full = len(vision.fullatt_block_indexes)
    work = 0.0
    seen: dict[tuple[Any, ...], int] = {}
    for completion, request in zip(engine.generate(requests), requests, strict=True):
        num_prompt, num_answer = completion.num_prompt_tokens, completion.num_completion_tokens
        before, _, after = completion.prompt.rpartition(engine.processor.image_token)
        num_tail = len(engine.processor.tokenizer(after)["input_ids"])
        key = (before, *request.images)
        if key not in seen:
            seen[key] = num_head = num_prompt - num_tail
            num_visual = sum(engine._count_visual_tokens(image) for image in request.images)
            num_patches = num_visual * merge
            work += 2 * (in_blocks * num_patches + in_merger * num_visual)
            context = num_full * num_patches + (vision.depth - num_full) * min(window, num_patches)
            work += 4 * vision.hidden_size * num_patches * context
            work += 2 * in_text * num_head + 4 * width * num_head * num_head / 2
        num_new = num_tail + num_answer - 1  # the last token is not read
        work += 2 * in_text * num_new + 4 * width * num_new * (num_prompt + num_answer / 2)
        work += 2 * head * num_answer
    return work


def num_weights(module: torch.nn.Module) -> int:
    """Count the weights of matrices: what a token is multiplied by."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def build_random_model(processor: Path, path: Path) -> str:
    """Write a Qwen2.5-VL of 132 M parameters beside the files of a real one's tokenizer and processor."""
    shutil.copytree(processor, path)
    config = json.loads((path / "config.json").read_text())
    text = config.setdefault("text_config", {k: v for k, v in config.items() if k != "vision_config"})
    text |= {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 2, "max_window_layers": 8, "layer_types": ["full_attention"] * 8,
        "tie_word_embeddings": True, "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }  # fmt: skip
    text.pop("rope_scaling", None)
    vision = config["vision_config"] | {
        "hidden_size": 512, "depth": 8, "num_heads": 8, "intermediate_size": 1408, "out_hidden_size": 512,
        "fullatt_block_indexes": [3, 7],
    }  # fmt: skip
    kept = {name: config[name] for name in config if name.endswith("_token_id")}
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **kept)
    )
    model.float().save_pretrained(path)
    generation = json.loads((path / "generation_config.json").read_text())
    generation |= {"repetition_penalty": 1.0, "do_sample": False}  # greedy, the same in all ways
    for name in ("temperature", "top_p", "top_k"):
        generation.pop(name, None)
    (path / "generation_config.json").write_text(json.dumps(generation))
    return str(path)


def print_table(
    options: argparse.Namespace,
    rates: dict[str, list[float]],
    limit: Sequence[float],
    work: float,
    products: Sequence[float],
    memory: dict[str, float],
) -> None:
    """Print medians with their spread, and how the engine compares."""
    rates = {**{name: values for name, values in rates.items() if values}, "limit": list(limit)}
    print(f"\n{options.num_rows} rows, {options.repeats} repeats, {options.num_threads} threads, float32\n")
    print(f"{'samples/s':14} {'median':>8} {'lowest':>8} {'highest':>8} {'engine / it':>12} {'peak GiB':>9}")
    ratios = {}
    for name, values in rates.items():
        ratio = [one / other for one, other in zip(rates["engine"], values, strict=True)]
        ratios[name] = statistics.median(ratio)
        peak = f"{memory[name]:9.2f}" if name in memory else ""
        print(
            f"{name:14} {statistics.median(values):8.2f} {min(values):8.2f} {max(values):8.2f} "
            f"{ratios[name]:12.2f} {peak}"
        )
    rate = statistics.median(products) / 1e9
    print(f"\n{work / 1e9:.0f} GFLOP at {rate:.0f} GFLOP/s; peaks of memory add up from above")
    print(json.dumps({**vars(options), "samples_per_s": rates, "ratio": ratios, "gflop": work / 1e9}))


if __name__ == "__main__":
    main()
