"""Fine-tuning in the process of the test: small runs over the built-in charts, and losses by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from vlmray.config import FinetuneConfig
from vlmray.dataset.selection import open_selection
from vlmray.training.run import TrainingData, TrainingRun
from vlmray.training.samples import Conversations, group_turns, open_images, to_feature
from vlmray.training.worker import LocalWorker, Outcome, train_loop_per_worker

END = "<|im_end|>"


def make_config(model: Path, **options: Any) -> FinetuneConfig:
    """Options of a run that takes milliseconds a step and logs every one."""
    defaults = {
        "dataset_name": "charts?num_rows=64&family=count,position",  # answers of several lengths
        "max_pixels": 4 * 28 * 28,
        "lora_dropout": 0.0,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "eval_samples": 0,
        "max_new_tokens": 6,
        "warmup_ratio": 0.0,
        "dtype": "float32",
    }
    return FinetuneConfig(model_id=str(model), **{**defaults, **options})


class Overwritten:
    """A source some of whose rows are others."""

    on_driver = False
    same_image_column = None
    base_dir = None

    def __init__(self, source: Any, rows: Mapping[int, Mapping[str, Any]]) -> None:
        self.column_names = source.column_names
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        rows = zip(self._source.read(indices, columns), indices, strict=True)
        return [{**row, **self._rows.get(index, {})} for row, index in rows]


def open_conversations(
    config: FinetuneConfig,
    split: str,
    slices: str,
    max_turns: int = 1,
    rows: Mapping[int, Mapping[str, Any]] | None = None,
) -> Conversations:
    """Open samples as a run does, some rows overwritten."""
    asked = open_selection(config, split, slices)
    return Conversations(
        source=Overwritten(asked.source, rows or {}),
        spec=asked.spec,
        split=split,
        system_prompt=asked.system_prompt,
        turns=group_turns(asked.source, asked.spec, asked.selected, max_turns),
    )


def open_data(
    config: FinetuneConfig,
    rows: Mapping[int, Mapping[str, Any]] | None = None,
    eval_rows: Mapping[int, Mapping[str, Any]] | None = None,
) -> TrainingData:
    return TrainingData(
        train=open_conversations(config, "train", config.sample_slices, config.max_turns, rows),
        evaluation=open_conversations(
            config, config.eval_split or "train", config.eval_slices or "[:]", rows=eval_rows
        )
        if config.evaluates
        else None,
    )


def train(
    config: FinetuneConfig,
    folder: Path | None = None,
    data: TrainingData | None = None,
    worker_type: type[LocalWorker] = LocalWorker,
) -> Outcome:
    """Train in this process; the last checkpoint is left in the folder."""
    data = data or open_data(config)
    run = TrainingRun.of(config, data)
    return train_loop_per_worker({"run": run}, worker_type(run, data, folder))


def curve(outcome: Outcome, name: str = "loss") -> list[float]:
    """What the history says under a name, in its order."""
    return [entry[name] for entry in outcome.history if name in entry]


def read_features(conversations: Conversations, samples: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Samples as the collator takes them."""
    rows = conversations.read(range(len(conversations)) if samples is None else samples)
    return [feature for row in open_images(rows) if (feature := to_feature(row)) is not None]


def sum_loss(model: Any, processor: Any, feature: Mapping[str, Any]) -> tuple[float, int]:
    """Loss over a sample's answer and the number of its tokens, without any collator or trainer."""
    *question, answer = feature["messages"]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    inputs = dict(processor(text=[prompt], images=feature["images"] or None, return_tensors="pt"))
    ids = processor.tokenizer(answer["content"][0]["text"] + END, return_tensors="pt")["input_ids"]
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        fill = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}.get(name, torch.zeros_like(ids))
        inputs[name] = torch.cat([inputs[name], fill], dim=1)
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -ids.shape[1] - 1 : -1]
    return float(cross_entropy(logits.float(), ids[0], reduction="sum")), ids.shape[1]


def mean_loss(model: Any, processor: Any, features: Sequence[Mapping[str, Any]]) -> float:
    """Mean over all answer tokens."""
    sums, counts = zip(*(sum_loss(model, processor, feature) for feature in features), strict=True)
    return sum(sums) / sum(counts)
