"""Fine-tuning against plain TRL: the same run by TRL alone, and by the job's worker without and with Ray.

    python -m benchmarks.training
    python -m benchmarks.training --model_id random-132m --processor path/to/Qwen2.5-VL-7B-Instruct \\
        --dataset_name path/to/ChartQA --dataset_split test --num_rows 48 --batch_size 4

All three train the same samples in the same order with the same options, one worker. The plain script is
what one would write with TRL alone: a dataset of PIL images, TRL's collator, SFTTrainer. Timed is the
training itself, without loading the model: the first epoch without the first fifth of its steps, in which
workers and caches warm up, and the later ones, in which the vision tower has seen all images. Sides
alternate, so a slow spell hits all of them.

`random-132m` is a Qwen2.5-VL of that size with random weights and the tokenizer and image processor of
`--processor`.
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
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from benchmarks.common.charts import write_charts
from benchmarks.common.models import RANDOM, build_random_model
from vlmray import cluster
from vlmray.config import FinetuneConfig
from vlmray.finetune.job import fit
from vlmray.finetune.plan import FinetuneRun, open_training_data
from vlmray.models.loading import load_qwen_vl_model_and_processor
from vlmray.models.source import resolve_model_id
from vlmray.storage.run_folder import RunFolder
from vlmray.training.arguments import sft_arguments
from vlmray.training.run import TRAIN, TrainingData, TrainingRun
from vlmray.training.samples import open_images, to_feature
from vlmray.training.worker import lora_config_of, train_loop_per_worker

END_TOKEN = "<|im_end|>"
EPOCHS = ("first epoch", "later epochs")

Rates = dict[str, dict[str, list[float]]]
"""Samples per second by side and epoch, one for each repeat."""


def main() -> None:
    """Measure all sides and print a table and one JSON line."""
    options = parse_options()
    cluster.connect()
    with tempfile.TemporaryDirectory() as folder:
        source = options.dataset_name or write_charts(Path(folder) / "train.parquet", options.num_rows)
        if options.model_id in RANDOM:
            options.model_id = build_random_model(
                options.model_id, options.processor, Path(folder) / options.model_id
            )
        measure_all(options, source)


def measure_all(options: argparse.Namespace, dataset_name: str) -> None:
    """Measure all sides on one dataset."""
    workers = cluster.plan_workers((1, 1))
    torch.set_num_threads(workers.num_threads or torch.get_num_threads())
    config = FinetuneConfig(
        model_id=options.model_id, dataset_name=dataset_name, dataset_split=options.dataset_split,
        sample_slices=f"[:{options.num_rows}]", num_train_epochs=options.num_train_epochs,
        per_device_train_batch_size=options.batch_size, logging_steps=1, save_steps=10**6, num_workers="1",
        lora_dropout=0.0, gradient_checkpointing=options.gradient_checkpointing,
        train_sampling_strategy=options.train_sampling_strategy,
    )  # fmt: skip
    data = open_training_data(config)
    run = TrainingRun.of(config, data, num_workers=1, num_threads=workers.num_threads)
    sides = {
        "plain TRL": lambda: train_plainly(run, data),
        "worker without Ray": lambda: train_alone(run, data),
        "job on Ray": lambda: train_on_ray(run, data, workers),
    }
    rates: Rates = {name: {epoch: [] for epoch in EPOCHS} for name in sides}
    losses: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for name, measure in sides.items():
            times, losses[name] = measure()
            for epoch, rate in rates_of(times, run).items():
                rates[name][epoch].append(rate)
    print_table(rates, losses, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_id", default="tiny-random")
    parser.add_argument("--processor", help="folder of a real Qwen2.5-VL, for random-132m")
    parser.add_argument("--dataset_name", help="default: charts, drawn beforehand")
    parser.add_argument("--dataset_split", default="train")
    parser.add_argument("--num_rows", type=int, default=240)
    parser.add_argument("--num_train_epochs", type=float, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--train_sampling_strategy", default="random")
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
    model, processor = load_qwen_vl_model_and_processor(
        resolve_model_id(config.model_id), max_pixels=config.max_pixels
    )
    plan = run.plan(TRAIN, 1)
    order = [sample for batch in plan.batches(0, 0, run.num_steps) for sample in batch]
    rows = [to_feature(row) for row in open_images(data.train.read(order))]
    dataset = Dataset.from_list([prompt_and_completion(row, processor) for row in rows if row])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        ours = sft_arguments(run, Path(folder), 1)
        same = ("use_cpu", "bf16", "gradient_checkpointing", "gradient_checkpointing_kwargs")
        arguments = SFTConfig(
            output_dir=folder, per_device_train_batch_size=config.per_device_train_batch_size,
            max_steps=run.num_steps, learning_rate=config.learning_rate, lr_scheduler_type="cosine",
            warmup_steps=config.warmup_ratio, logging_steps=1, save_strategy="no", report_to="none",
            max_length=None, disable_tqdm=True, seed=config.seed, train_sampling_strategy="sequential",
            **{name: getattr(ours, name) for name in same},
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=dataset, processing_class=processor,
            peft_config=lora_config_of(config, model), callbacks=[clock],
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
        ready = FinetuneRun(training=run, data=data, workers=workers, folder=RunFolder.create(folder))
        outcome, _ = fit(ready)
    return outcome.step_ends, losses_of(outcome.history)


def losses_of(history: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def rates_of(times: list[float], run: TrainingRun) -> dict[str, float]:
    """Return samples per second of the first epoch and of those behind it, from the ends of steps."""
    steps = run.plan(TRAIN, 1).steps_per_epoch
    ranges = dict(zip(EPOCHS, ((steps // 5, steps - 1), (steps - 1, len(times) - 1)), strict=True))
    return {
        name: (run.num_samples_of(last + 1) - run.num_samples_of(first + 1)) / (times[last] - times[first])
        for name, (first, last) in ranges.items()
    }


def print_table(rates: Rates, losses: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print medians with their spread, beside what they are of plain TRL's."""
    print(
        f"{options.num_rows} samples, batches of {options.batch_size}, {options.num_train_epochs:g} epochs, "
        f"{options.repeats} repeats\n"
    )
    print(f"{'samples/s':33}" + f" {'median':>7} {'lowest':>7} {'highest':>7}" * 2 + "  (rate, of plain TRL)")
    ratios = {}
    for name, by_epoch in rates.items():
        ratios[name] = {}
        for epoch, values in by_epoch.items():
            plain = rates["plain TRL"][epoch]
            shares = [value / other for value, other in zip(values, plain, strict=True)]
            ratios[name][epoch] = statistics.median(shares)
            numbers = [f(v) for v in (values, shares) for f in (statistics.median, min, max)]
            print(f"{name:19} {epoch:13} " + " ".join(f"{number:7.3g}" for number in numbers))
    pairs = [pair for values in losses.values() for pair in zip(values, losses["plain TRL"], strict=True)]
    difference = max(abs(one - other) for one, other in pairs)
    print(f"\nlargest difference of a step's loss to plain TRL: {difference:.2g}")
    print(json.dumps({"samples_per_s": rates, "ratio": ratios, "loss_difference": difference}))


if __name__ == "__main__":
    main()
