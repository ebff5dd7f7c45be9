"""What a checkpoint holds beside the trainer's own files: for its artifacts, and for a run that goes on."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from vlmray.training.collator import DataCollatorForVLMSFT
from vlmray.training.evaluation import Evaluation
from vlmray.training.run import EVALUATION, TRAIN
from vlmray.training.samples import Feature, Features

NUM_PROBES = 8
"""Samples whose answers go with every checkpoint, to be compared with those of the loaded adapter."""

STATE_FILE = "trainer_state.json"  # transformers' own
ANSWERS_FILE = "answers.json"  # the probes, as the model of this checkpoint answers them
EVALUATED_FILE = "evaluated.json"  # what the last evaluation answered
ERRORS_FILE = "errors-{rank}.json"  # why samples of a worker were left out: {"train": ..., "evaluation": ...}


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What earlier starts of a run did, as its last checkpoint tells a worker; nothing where it begins."""

    state: Mapping[str, Any] = field(default_factory=dict)
    """Of transformers' trainer."""

    errors: dict[str, str] = field(default_factory=dict)
    """Why samples were left out of training, by sample id."""

    eval_errors: dict[str, str] = field(default_factory=dict)
    answered: list[dict[str, Any]] = field(default_factory=list)
    """Evaluation samples with their last answers."""

    @classmethod
    def read(cls, folder: Path | None, rank: int, world_size: int) -> Earlier:
        """Read what `CheckpointWriter` wrote, by as many workers as there are now or others."""
        if folder is None:
            return cls()
        mine = [
            _read_json(path)
            for path in sorted(folder.glob(ERRORS_FILE.format(rank="*")))
            if int(path.stem.rpartition("-")[2]) % world_size == rank
        ]
        return cls(
            state=_read_json(folder / STATE_FILE),
            errors={name: why for errors in mine for name, why in errors[TRAIN].items()},
            eval_errors={name: why for errors in mine for name, why in errors[EVALUATION].items()},
            answered=_read_json(folder / EVALUATED_FILE),
        )

    @property
    def step(self) -> int:
        """Optimizer steps that were taken."""
        return self.state.get("global_step", 0)


class Probes:
    """Makes batches, and keeps the first samples that can be trained on to ask about them later.

    Args:
        collator: Makes them.
    """

    def __init__(self, collator: DataCollatorForVLMSFT) -> None:
        self._collator = collator
        self._kept: list[Feature] = []

    def collate(self, features: Features) -> dict[str, torch.Tensor]:
        """Make a batch of a list of samples."""
        batch = self._collator(features)
        if len(self._kept) < NUM_PROBES:
            passed_over = {*self._collator.errors, *(probe["sample_id"] for probe in self._kept)}
            good = (f for f in features if f is not None and f["sample_id"] not in passed_over)
            self._kept += islice(good, NUM_PROBES - len(self._kept))
        return batch

    def so_far(self) -> list[Feature]:
        """Return what is kept; a thread that collates ahead may be adding to it."""
        return list(self._kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWriter:
    """Adds to a checkpoint what the trainer does not write."""

    rank: int
    errors: Mapping[str, str]
    """Why samples were left out of training so far, by sample id."""

    probes: Probes
    evaluation: Evaluation

    def write(self, model: Any, folder: Path) -> None:
        """Write the part of this worker."""
        errors = {TRAIN: dict(self.errors), EVALUATION: self.evaluation.collator.errors}
        _write_json(folder / ERRORS_FILE.format(rank=self.rank), errors)
        if self.rank == 0:
            probes = self.probes.so_far()
            _write_json(folder / ANSWERS_FILE, _with_images(probes, self.evaluation.answer(model, probes)))
            _write_json(folder / EVALUATED_FILE, self.evaluation.answered)


def _with_images(probes: Sequence[Feature], answered: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Complete answered samples by what it takes to ask them again elsewhere."""
    return [
        {
            **row,
            "messages": feature["messages"],
            "answer": feature["answer"],
            "images": [_encode_png(image) for image in feature["images"]],
        }
        for feature, row in zip(probes, answered, strict=True)
    ]


def _encode_png(image: Image) -> str:
    """Encode an image without loss, as text."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
