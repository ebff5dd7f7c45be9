"""What Ray costs in training: the same run by plain TRL, and by the job's worker without and with Ray.

    python benchmarks/training.py --num_steps 60 --repeats 3

All three train the same samples in the same order with the same options, one worker. The plain script is
what one would write with TRL alone: a dataset of PIL images, TRL's collator, SFTTrainer. Timed is the
training itself from its first step to its last, without loading the model, and without the first fifth
of the steps, in which workers and caches warm up. Sides alternate, so a slow spell hits all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from overhead import write_charts
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from vlmray import cluster
from vlmray.config import FinetuneConfig
from vlmray.conversations import open_images, to_feature
from vlmray.finetune import FinetuneRun, fit, open_training_data
from vlmray.model import load_qwen_vl_model_and_processor
from vlmray.outputs import OutputDirectory
from vlmray.small_models import resolve_model_id
from vlmray.training import lora_config_of, train_loop_per_worker
from vlmray.training_run import TRAIN, TrainingData, TrainingRun

END_TOKEN = "<|im_end|>"


def main() -> None:
    """Measure all sides and print a table and one JSON line."""
    options = parse_options()
    cluster.connect()
    with tempfile.TemporaryDirectory() as folder:
        num_rows = options.num_steps * options.batch_size
        source = options.dataset_name or write_charts(Path(folder) / "train.parquet", num_rows)
        measure_all(options, source)


def measure_all(options: argparse.Namespace, dataset_name: str) -> None:
    """Measure all sides on one dataset."""
    workers = cluster.plan_workers(1)
    torch.set_num_threads(workers.num_threads or torch.get_num_threads())
    config = FinetuneConfig(
        model_id=options.model_id, dataset_name=dataset_name, max_steps=options.num_steps,
        per_device_train_batch_size=options.batch_size, logging_steps=1, save_steps=10**6, num_workers=1,
        lora_dropout=0.0,
    )  # fmt: skip
    data = open_training_data(config)
    run = TrainingRun.of(config, data, num_workers=1, num_threads=workers.num_threads)
    rates: dict[str, list[float]] = {"plain TRL": [], "worker without Ray": [], "job on Ray": []}
    losses: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for name, measure in (
            ("plain TRL", lambda: train_plainly(run, data)),
            ("worker without Ray", lambda: train_alone(run, data)),
            ("job on Ray", lambda: train_on_ray(run, data, workers)),
        ):
            times, losses[name] = measure()
            rates[name].append(steady_rate(times, options.batch_size))
    print_table(rates, losses, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_id", default="tiny-random")
    parser.add_argument("--dataset_name", help="default: charts, drawn beforehand")
    parser.add_argument("--num_steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def train_plainly(run: TrainingRun, data: TrainingData) -> tuple[list[float], list[float]]:
    """Train with TRL alone; return the times of the steps and their losses."""
    config = run.config
    set_seed(config.seed)
    model, processor = load_qwen_vl_model_and_processor(resolve_model_id(config.model_id))
    plan = run.plan(TRAIN, 1)
    order = [sample for number in range(config.max_steps) for sample in plan.batch(0, number)]
    rows = [to_feature(row) for row in open_images(data.train.read(order))]
    dataset = Dataset.from_list([prompt_and_completion(row, processor) for row in rows if row])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, per_device_train_batch_size=config.per_device_train_batch_size,
            max_steps=config.max_steps, learning_rate=config.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=config.warmup_ratio, logging_steps=1, save_strategy="no", report_to="none",
            use_cpu=not torch.cuda.is_available(), max_length=None, gradient_checkpointing=False,
            bf16=False, disable_tqdm=True, seed=config.seed, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=processor,
            peft_config=lora_config_of(config), callbacks=[clock],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.times, losses_of(trainer.state.log_history)


def prompt_and_completion(feature: Any, processor: Any) -> dict[str, Any]:
    """Word a sample as TRL's collator takes it."""
    *question, answer = feature["messages"]
    return {
        "prompt": processor.apply_chat_template(question, add_generation_prompt=True),
        "completion": answer["content"][0]["text"] + END_TOKEN,
        "images": feature["images"],
    }


def train_alone(run: TrainingRun, data: TrainingData) -> tuple[list[float], list[float]]:
    """Train as the job's worker, in this process."""
    outcome = train_loop_per_worker({"run": run, "data": data})
    return outcome.step_ends, losses_of(outcome.history)


def train_on_ray(
    run: TrainingRun, data: TrainingData, workers: cluster.WorkerPlan
) -> tuple[list[float], list[float]]:
    """Train as the job does, on one worker of Ray Train fed by Ray Data."""
    with tempfile.TemporaryDirectory() as folder:
        ready = FinetuneRun(training=run, data=data, workers=workers, folder=OutputDirectory.create(folder))
        outcome, _ = fit(ready)
    return outcome.step_ends, losses_of(outcome.history)


def losses_of(history: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def steady_rate(times: list[float], batch_size: int) -> float:
    """Return samples per second from the times at which steps ended, after the first fifth of them."""
    first = len(times) // 5
    return batch_size * (len(times) - 1 - first) / (times[-1] - times[first])


def print_table(
    rates: dict[str, list[float]], losses: dict[str, list[float]], options: argparse.Namespace
) -> None:
    plain = rates["plain TRL"]
    print(
        f"{options.model_id}, {options.num_steps} steps of {options.batch_size}, {options.repeats} repeats\n"
    )
    print(
        f"{'samples/s':22}"
        + f" {'median':>8} {'lowest':>8} {'highest':>8}" * 2
        + "  (rate, ratio to the first)"
    )
    ratios = {}
    for name, values in rates.items():
        ratios[name] = [value / other for value, other in zip(values, plain, strict=True)]
        numbers = [statistics.median(values), min(values), max(values)]
        numbers += [statistics.median(ratios[name]), min(ratios[name]), max(ratios[name])]
        print(f"{name:22} " + " ".join(f"{number:8.3g}" for number in numbers))
    pairs = [pair for values in losses.values() for pair in zip(values, losses["plain TRL"], strict=True)]
    difference = max(abs(one - other) for one, other in pairs)
    print(f"\nlargest difference of a step's loss to plain TRL: {difference:.2g}")
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    print(json.dumps({"samples_per_s": rates, "ratio": medians, "loss_difference": difference}))


if __name__ == "__main__":
    main()
