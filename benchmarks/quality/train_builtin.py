"""Train the built-in model on all looks and kinds of charts, on one GPU and in a given time.

    python -m benchmarks.quality.train_builtin --output_dir outputs/builtin-looks
    python -m benchmarks.quality.train_builtin --output_dir outputs/toy --minutes 0.5 --batch_size 8 \\
        --num_charts_to_check 8

    charts, drawn by all cores -> transformers' Trainer, until the time is over -> weights, bfloat16
                                                                                      |
                     --output_dir, by one rename <- model card and recipe <- every family on unseen charts

The learning rate follows the clock, so that the schedule ends where the time does, on any machine. Nothing
is needed but torch, transformers and vlmray itself: no Ray, no TRL. To have the model as `builtin`, copy the
folder to `vlmray/builtin`. It does not resume.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # in every worker, which has one core

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from benchmarks.quality.builtin import ALL_TRAINED, every_family, score, tabulate
from benchmarks.quality.train_batches import ChartBatches, TimedLoader, load
from benchmarks.quality.train_card import TrainedModel
from benchmarks.quality.train_clock import WARMUP, Clock, ClockTrainer
from vlmray.builtin.charts import KINDS, ChartsConfig
from vlmray.builtin.models import UNTRAINED
from vlmray.builtin.questions import FAMILIES
from vlmray.builtin.random_charts import STYLES
from vlmray.engines import build_engine
from vlmray.engines.transformers.attention import pack_attention
from vlmray.engines.transformers.engine import TransformersEngine
from vlmray.models.loading import load_qwen_vl_model_and_processor
from vlmray.models.source import resolve_model_id
from vlmray.training.optimizers import muon_factory

TAUGHT_LATER = ("count_above", "naming", "comparison", "difference")
"""Families that are left for a fine-tuning to teach."""

TRAINED = tuple(family for family in FAMILIES if family not in TAUGHT_LATER)
WEIGHT_DECAY = 0.01
ADAM_BETA2 = 0.95
MOST_CHARTS = 2**28
WEIGHTS = "model.safetensors"
CHECK_SEED = 1000
"""Further than the seed of training."""


def main() -> None:
    """Train, check, write the folder, and print a table and one JSON line."""
    options = parse_options()
    logging.disable_progress_bar()
    output_dir = Path(options.output_dir)
    if output_dir.exists() and not options.overwrite:
        raise SystemExit(
            f"--output_dir {output_dir} exists; pass --overwrite to replace it, or choose another folder"
        )
    with scratch_folder(output_dir) as folder:
        figures = train(options, folder)
        print(f"weights are in {folder} until they are checked", flush=True)
        figures |= check(options, folder, figures)
        for path in folder.iterdir():
            path.chmod(0o644)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        folder.rename(output_dir)
    print(json.dumps({**vars(options), **figures}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training; checks come on top")
    parser.add_argument("--kind", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--style", choices=STYLES, default="varied")
    parser.add_argument("--questions_per_image", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument(
        "--num_workers", type=int, help="that draw charts; default: a core is left to the model"
    )
    parser.add_argument("--num_charts_to_check", type=int, default=1000, help="in the end, of all kinds")
    parser.add_argument("--check_every_minutes", type=float, help="ask a few charts meanwhile")
    parser.add_argument("--check_batch_size", type=int, default=256)
    parser.add_argument("--report_every_seconds", type=float, default=10.0)
    options = parser.parse_args()
    for name in ("minutes", "batch_size", "report_every_seconds", "check_batch_size"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be more than 0, got {getattr(options, name)}")
    try:
        training_charts(options, 1)
    except ValueError as error:
        parser.error(str(error))
    if options.num_workers is None:
        options.num_workers = max(1, num_cores() - 1)
    options.num_charts_to_check = max(options.num_charts_to_check, options.kind.count(",") + 1)
    return options


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def scratch_folder(output_dir: Path) -> Iterator[Path]:
    """Give a folder beside the output's place; it is deleted if it is still there in the end.

    Only weights whose check failed are kept: they took long.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    folder.chmod(0o755)
    try:
        yield folder
    except BaseException as error:
        if (folder / WEIGHTS).exists() and not isinstance(error, KeyboardInterrupt):
            print(f"the trained weights are kept in {folder}, unchecked", flush=True)
        else:
            shutil.rmtree(folder)
        raise


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


def train(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train from random weights, write the checkpoint and return the figures of the run."""
    on_gpu = torch.cuda.is_available()
    charts = training_charts(options, MOST_CHARTS)
    model_id = resolve_model_id(UNTRAINED)
    set_seed(options.seed)
    torch.set_num_threads(max(1, num_cores() - options.num_workers))
    model, processor = load_qwen_vl_model_and_processor(
        model_id, dtype="float32", device_map={"": 0}, attn_implementation="sdpa"
    )
    pack_attention(model)
    clock = Clock(60 * options.minutes)
    loader = load(ChartBatches(model_id, charts, options.batch_size), options.num_workers)
    progress = Progress(options, clock, loader, processor)
    with tempfile.TemporaryDirectory() as unused:
        trainer = ClockTrainer(
            model=model,
            args=training_arguments(options, unused),
            optimizer_cls_and_kwargs=(
                muon_factory,
                {"lr": options.learning_rate, "weight_decay": WEIGHT_DECAY, "betas": (0.9, ADAM_BETA2)},
            ),
            callbacks=[progress],
            clock=clock,
            loader=loader,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if not math.isfinite(progress.losses[-1]):
        raise SystemExit(f"the loss is {progress.losses[-1]}; try a lower --learning_rate")
    save(model, Path(model_id), folder)
    num_steps = trainer.state.global_step
    num_charts = num_steps * options.batch_size
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "a CPU",
        "precision": "bfloat16" if on_gpu else "float32",
        "num_steps": num_steps,
        "num_charts": num_charts,
        "training_min": clock.elapsed_s / 60,
        "charts_per_s": num_charts / clock.elapsed_s,
        "waited_for_data": progress.waited_s / clock.elapsed_s,
        "first_loss": progress.losses[0],
        "last_loss": progress.losses[-1],
    }


def save(model: Any, source: Path, folder: Path) -> None:
    """Write a model in bfloat16, with the tokenizer and all else as the source has it."""
    for config in (model.config.text_config, model.config.vision_config):
        config.dtype = torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in source.iterdir():
        if path.name not in ("config.json", WEIGHTS):
            shutil.copy(path, folder)


def training_arguments(options: argparse.Namespace, folder: str) -> TrainingArguments:
    """Return the arguments of a trainer that neither saves nor logs by itself."""
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder, max_steps=MOST_CHARTS, per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate, weight_decay=WEIGHT_DECAY, bf16=on_gpu, use_cpu=not on_gpu,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True, log_level="error",
        logging_nan_inf_filter=False, remove_unused_columns=False, seed=options.seed,
    )  # fmt: skip


def training_charts(options: argparse.Namespace, num_charts: int) -> ChartsConfig:
    """Return charts to train on."""
    return ChartsConfig(
        num_rows=num_charts * options.questions_per_image, seed=options.seed, kind=options.kind,
        style=options.style, questions_per_image=options.questions_per_image, family=",".join(TRAINED),
    )  # fmt: skip


class Progress(TrainerCallback):
    """Ends training when its time is over, and tells meanwhile how it goes.

    Args:
        options: Of the command.
        clock: Tells the time.
        loader: Knows how long the model waited.
        processor: To ask the model.
    """

    def __init__(
        self, options: argparse.Namespace, clock: Clock, loader: TimedLoader, processor: Any
    ) -> None:
        self.losses: list[float] = []
        """Mean loss between reports; the first is that of the first step."""
        self.waited_s = 0.0
        """Seconds that the model waited for batches, the first of all apart."""
        self._options = options
        self._clock = clock
        self._loader = loader
        self._processor = processor
        self._first_wait_s = 0.0
        self._reported = (0.0, 0, 0.0)
        self._num_checks = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._first_wait_s = self._loader.waited_s  # workers start
            self._clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        elapsed_s = self._clock.elapsed_s
        control.should_training_stop = self._clock.share >= 1
        is_due = elapsed_s - self._reported[0] >= self._options.report_every_seconds
        control.should_log = is_due or state.global_step == 1 or control.should_training_stop
        every = self._options.check_every_minutes
        if every and elapsed_s / 60 >= (self._num_checks + 1) * every and not control.should_training_stop:
            self._num_checks += 1
            with self._clock.paused():
                self._check(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self.losses.append(logs["loss"])
        self.waited_s = self._loader.waited_s - self._first_wait_s
        now = (self._clock.elapsed_s, state.global_step, self.waited_s)
        elapsed_s, steps, waited_s = (new - old for new, old in zip(now, self._reported, strict=True))
        self._reported = now
        size = self._options.batch_size
        print(
            f"{now[0]:6.1f} s  step {state.global_step:6,}  {state.global_step * size:9,} charts  "
            f"{steps * size / elapsed_s:7.1f} charts/s  loss {logs['loss']:.4f}  "
            f"gradient {logs['grad_norm']:.2f}  lr {logs['learning_rate']:.2e}  "
            f"waited for data {waited_s / elapsed_s:4.0%}",
            flush=True,
        )

    def _check(self, model: Any) -> None:
        """Ask the model as it is about a few charts."""
        model.eval()
        options = self._options
        charts = every_family(
            max(1, options.num_charts_to_check // 10), seed=options.seed + CHECK_SEED + 1, kind=options.kind,
            style=options.style,
        )  # fmt: skip
        engine = TransformersEngine(model, self._processor, batch_size=options.check_batch_size)
        try:
            table = tabulate(score(charts, engine), TRAINED)
        finally:
            engine.close()  # only its threads go: the model is the trainer's too
        print("  ".join(f"{name} {figures['accuracy']:.3f}" for name, figures in table.items()), flush=True)


# ---------------------------------------------------------------------------------------------
# What came of it
# ---------------------------------------------------------------------------------------------


def check(options: argparse.Namespace, folder: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Ask the written model about every kind of chart, print what it knows, and write its card and recipe."""
    started = time.perf_counter()
    engine = build_engine(
        engine="transformers", model_id=str(folder), dtype="float32", batch_size=options.check_batch_size
    )
    seen = training_charts(options, figures["num_charts"])
    num_charts = options.num_charts_to_check // len(seen.kinds)
    seed = options.seed + CHECK_SEED
    asked = {kind: every_family(num_charts, seed=seed, kind=kind, style=options.style) for kind in seen.kinds}
    by_kind = {kind: score(charts, engine) for kind, charts in asked.items()}
    engine.close()
    together = {
        family: [value for scores in by_kind.values() for value in scores[family]] for family in FAMILIES
    }
    families = tabulate(together, TRAINED)
    kinds = {kind: tabulate(scores, TRAINED) for kind, scores in by_kind.items()}
    print(f"\n{'family':26}{'questions':>10}{'right':>8}" + "".join(f"{kind:>8}" for kind in kinds))
    for family, row in families.items():
        cells = [row["accuracy"], *(table[family]["accuracy"] for table in kinds.values())]
        print(f"{family:26}{row['num_questions']:10,}" + "".join(f"{cell:8.3f}" for cell in cells))
    print(
        f"\n{figures['charts_per_s']:.0f} charts/s, {figures['waited_for_data']:.0%} of the time without data"
    )
    run = {
        **vars(options), **figures, "command": command(), "bf16": str(torch.cuda.is_available()).lower(),
        "warmup": WARMUP, "weight_decay": WEIGHT_DECAY, "adam_beta2": ADAM_BETA2,
    }  # fmt: skip
    trained = TrainedModel(charts=seen, run=run, families=families, kinds=kinds)
    (folder / "README.md").write_text(trained.card(), encoding="utf-8")
    (folder / "recipe.yaml").write_text(trained.recipe(), encoding="utf-8")
    return {
        "accuracy": families[ALL_TRAINED]["accuracy"], "families": families, "kinds": kinds,
        "checking_s": time.perf_counter() - started,
    }  # fmt: skip


def command() -> str:
    """Return how this was called."""
    return shlex.join(["python", "-m", "benchmarks.quality.train_builtin", *sys.argv[1:]])


if __name__ == "__main__":
    main()
