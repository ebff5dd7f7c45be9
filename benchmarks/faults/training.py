"""Training under fire: as many steps as planned, with the losses of an undisturbed run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

TOLERANCE = 1e-3


class Training:
    """`jobs/finetune.py` with a tiny model, frequent checkpoints and workers that may be fewer.

    Args:
        folder: Where checkpoints, adapter and logs go.
        num_workers: Of the option of that name.
        expected: Loss by step of an undisturbed run; None: this is one.
        num_steps: Optimizer steps.
    """

    name = "finetune"
    titles: ClassVar[dict[str, str]] = {"worker": "ray::RayTrainWorker"}

    def __init__(
        self, folder: Path, num_workers: str, expected: dict[int, float] | None = None, num_steps: int = 60
    ) -> None:
        folder.mkdir()
        self.log = folder / "driver.log"
        self._output, self._num_steps, self._expected = folder / "lora", num_steps, expected
        self._options = [
            "--model_id", "tiny-random", "--dataset_name", "charts?num_rows=64&kind=bar&style=plain",
            "--max_pixels", "3136", "--num_workers", num_workers, "--per_device_train_batch_size", "2",
            "--max_steps", str(num_steps), "--save_steps", "5", "--logging_steps", "1", "--lora_dropout", "0",
            "--learning_rate", "1e-3", "--max_failures", "50", "--output_dir", str(self._output),
        ]  # fmt: skip

    def options(self, num_starts: int) -> Sequence[str]:
        return [*self._options, "--resume"] if num_starts else self._options

    def progress(self) -> int:
        steps = [0]
        for path in self._output.glob("checkpoints/checkpoint_*/trainer_state.json"):
            with contextlib.suppress(OSError, ValueError):  # not whole yet, or gone by now
                steps.append(json.loads(path.read_bytes())["global_step"])
        return max(steps)

    def has_served(self) -> bool:
        return False  # its driver ends by itself

    def before_kill(self) -> None:
        pass  # the last checkpoint is looked for where it lies

    def losses(self) -> dict[int, float]:
        """Return the loss by step; nothing where the run did not complete."""
        run = self._output / "run.json"
        history = json.loads(run.read_bytes())["history"] if run.exists() else []
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}

    def findings(self) -> dict[str, float]:
        losses = self.losses()
        expected = losses if self._expected is None else self._expected
        differences = [abs(losses[step] - expected[step]) for step in losses.keys() & expected.keys()]
        return {
            "steps": self._num_steps,
            "steps_lost": self._num_steps - len(losses),
            "steps_off": sum(difference > TOLERANCE for difference in differences),
            "largest_loss_difference": max(differences, default=0.0),
            "half_written": len([*self._output.rglob(".*.tmp")]),
        }
