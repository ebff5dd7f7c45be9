"""Training batches for the built-in model, made in worker processes: the one with the GPU only moves tensors.

    number -> chart -> picture and questions -> DataCollatorForVLMSFT -> lay_out -> DataLoader
                                                                                        |
                                              loss <- model <- see_images <- on_device <-

Nothing is stored, every chart is drawn once. What transformers would work out for each image on the GPU in
a loop, positions and borders, is worked out here for the whole batch: it would take longer than the model.

Shapes: `B` charts, `T` tokens of the longest, `P` patches of all charts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers.vision_utils import get_vision_position_ids

from vlmray.builtin.charts import ChartDataset, ChartsConfig, ChartsSource
from vlmray.builtin.drawing import draw_chart
from vlmray.dataset.columns import get_dataset_columns
from vlmray.dataset.prompts import format_data
from vlmray.models.lora import build_skeleton
from vlmray.models.processors import load_processor
from vlmray.models.vision import replace_pixels
from vlmray.schema import Sample
from vlmray.training.collator import DataCollatorForVLMSFT

Batch = dict[str, torch.Tensor]

_AHEAD = 4
_SHARED_MEMORY = Path("/dev/shm")

_ON_CPU = ("image_ends", "image_grid_thw")
"""Tensors that stay: they are read as numbers, for which a GPU would have to be waited for."""


class ChartBatches(IterableDataset):
    """Batches of charts, endlessly; of several workers each has every so-manieth chart.

    Args:
        model_id: Folder of the model to train.
        charts: Says how charts look, and what is asked about each.
        batch_size: Charts in a batch.
    """

    def __init__(self, model_id: str, charts: ChartsConfig, batch_size: int) -> None:
        self.charts = ChartDataset(charts, "train")
        self.batch_size = batch_size
        self.template = get_dataset_columns(
            "charts", ChartsSource(charts.name, "train").column_names
        ).prompt_template
        processor = load_processor(model_id)
        # Pixels travel as the bytes that they are; the rest is done where they arrive.
        processor.image_processor.do_rescale = processor.image_processor.do_normalize = False
        self.collator = DataCollatorForVLMSFT(processor)
        self.skeleton = build_skeleton(model_id)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            torch.set_num_threads(1)  # the other cores have workers of their own
        for first in count(step=self.batch_size):
            yield self.make([worker + num_workers * at for at in range(first, first + self.batch_size)])

    def make(self, numbers: Sequence[int]) -> Batch:
        """Draw charts and make a batch of them.

        Raises:
            RuntimeError: A chart cannot be trained on.
        """
        # Images of one size go through attention together.
        features = sorted(map(self.read, numbers), key=lambda feature: feature["images"][0].size)
        batch = self.collator(features)
        if self.collator.errors:
            raise RuntimeError(f"charts cannot be trained on: {self.collator.errors}")
        return self.lay_out(batch)

    def read(self, number: int) -> dict[str, Any]:
        """Draw a chart and word its questions: what training makes of its rows, but no PNG."""
        asked = self.charts.config.questions_per_image
        rows = range(number * asked, (number + 1) * asked)
        messages = []
        for row in rows:
            question = self.charts.ask(row)
            sample = Sample(
                sample_id=f"train-{row}", question=question["question"], answers=tuple(question["answers"]),
                images=(b"",) if row == rows[0] else (),  # its place
            )  # fmt: skip
            messages += format_data(sample, prompt_template=self.template, with_answer=True)
        picture = draw_chart(self.charts.chart(rows[0])).render()
        return {"sample_id": f"train-{rows[0]}", "messages": messages, "images": [picture]}

    def lay_out(self, batch: Batch) -> Batch:
        """Return what the model needs of a batch and nothing else.

        Padding is on the right and attention is causal, so no token sees any: there is no mask.

        Returns:
            `input_ids` and `labels` (B, T), `position_ids` (3, B, T), `pixels` (P, 3, a patch) in bytes,
            `image_mean` and `image_std` (3, 1) of these, `image_position_ids` (P, 2), `image_ends` (B + 1,),
            `image_grid_thw` (B, 3).
        """
        model, grids = self.skeleton.model, batch["image_grid_thw"]
        positions, _ = model.get_rope_index(
            batch["input_ids"], batch["mm_token_type_ids"], grids, attention_mask=batch["attention_mask"]
        )
        vision = model.config.vision_config
        scale = self.collator.processor.image_processor
        patches = batch["pixel_values"].unflatten(1, (vision.in_channels, vision.temporal_patch_size, -1))
        return {
            "input_ids": batch["input_ids"],
            "labels": batch["labels"],
            "position_ids": positions,
            "pixels": patches[:, :, 0].to(torch.uint8),  # a picture is a film of equal frames
            "image_mean": torch.tensor(scale.image_mean)[:, None] / scale.rescale_factor,
            "image_std": torch.tensor(scale.image_std)[:, None] / scale.rescale_factor,
            "image_position_ids": get_vision_position_ids(grids, vision.spatial_merge_size),
            "image_ends": torch.nn.functional.pad(grids.prod(-1).cumsum(0), (1, 0)).to(torch.int32),
            "image_grid_thw": grids,
        }


class TimedLoader(DataLoader):
    """A loader that notes how long its batches were waited for."""

    waited_s = 0.0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            started = time.perf_counter()
            batch = next(batches)  # the charts do not end
            self.waited_s += time.perf_counter() - started
            yield batch


def load(batches: ChartBatches, num_workers: int) -> TimedLoader:
    """Return the loader of batches that workers make, each a few ahead; without workers, this process.

    Raises:
        ValueError: The memory that processes share has no room for one batch of each worker.
    """
    workers: dict[str, Any] = {}
    if num_workers:
        workers = {"multiprocessing_context": "fork", "prefetch_factor": _room_ahead(batches, num_workers)}
    return TimedLoader(
        batches, batch_size=None, num_workers=num_workers, pin_memory=torch.cuda.is_available(), **workers
    )


def _room_ahead(batches: ChartBatches, num_workers: int) -> int:
    """Return how many batches of each worker shared memory has room for; a full one kills without a word."""
    if not _SHARED_MEMORY.is_dir():
        return _AHEAD
    size = sum(tensor.nbytes for tensor in batches.make(range(8)).values()) // 8 * batches.batch_size
    free = shutil.disk_usage(_SHARED_MEMORY).free
    ahead = int(0.8 * free / (num_workers * size))
    if ahead < 1:
        raise ValueError(
            f"{_SHARED_MEMORY} has {free / 2**20:.0f} MiB free, and {num_workers} workers need "
            f"{num_workers * size / 2**20:.0f}; lower --num_workers or --batch_size, or enlarge it"
        )
    return min(_AHEAD, ahead)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch, without waiting for it to arrive."""
    return {
        name: tensor if name in _ON_CPU else tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
    }


def see_images(model: Any, batch: Batch) -> dict[str, Any]:
    """Put what the model's vision tower makes of the images in the place of their pixels.

    Every layer of the tower has to attend to the whole image, for its windows are not laid out.
    """
    vision, ends = model.config.vision_config, batch["image_ends"]
    patches = (batch["pixels"] - batch["image_mean"]) / batch["image_std"]
    patches = patches.unsqueeze(2).expand(-1, -1, vision.temporal_patch_size, -1).flatten(1)
    longest = int(ends.diff().max())
    features = model.model.visual(
        patches,
        grid_thw=batch["image_grid_thw"],
        position_ids=batch["image_position_ids"],
        window_index=torch.arange(len(patches) // vision.spatial_merge_size**2, device=patches.device),
        cu_seqlens=ends,
        cu_window_seqlens=ends,
        max_seqlen=longest,
        max_window_seqlen=longest,
    ).pooler_output
    text: dict[str, Any] = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
    return replace_pixels({**text, "use_cache": False}, [features])
