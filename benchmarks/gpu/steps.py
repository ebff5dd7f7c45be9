"""The steps of the GPU check, in the order in which they are worth most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One question to a GPU."""

    name: str
    function: str
    """`module:function` of this package; it takes the setting, and yields figures."""

    limit_s: float
    needs: Sequence[str] = ()
    """Packages, without which the step is left out."""

    options: Mapping[str, Any] = field(default_factory=dict)
    gpu_only: bool = False

    def missing(self, device: str) -> str | None:
        """Say why the step cannot be taken here, or return None."""
        packages = [package for package in self.needs if find_spec(package) is None]
        if packages:
            return f"no {' and no '.join(packages)} here"
        return "needs a GPU" if self.gpu_only and device != "cuda" else None


_TRAINING = ("ray", "trl", "datasets", "peft")
_JOBS = ("ray", "datasets", "psutil")

STEPS = (
    Step(name="device", function="device:describe", limit_s=60),
    Step(name="exact", function="exact:measure", limit_s=150),
    Step(name="engine-7b", function="engine:measure", limit_s=150, options={"size": "large"}),
    Step(name="memory", function="memory:measure", limit_s=75),
    Step(name="train-lora", function="training:measure", limit_s=180, needs=_TRAINING),
    Step(name="pipeline", function="jobs:pipeline", limit_s=120, needs=_JOBS),
    Step(name="serve", function="jobs:serve", limit_s=120, needs=_JOBS),
    Step(name="finetune", function="jobs:finetune", limit_s=120, needs=(*_TRAINING, "psutil")),
    Step(name="infer-shared", function="jobs:infer", limit_s=90, needs=_JOBS),
    Step(name="benchmark", function="jobs:benchmark", limit_s=90, needs=_JOBS),
    Step(name="engine-3b", function="engine:measure", limit_s=90, options={"size": "small"}),
    Step(
        name="train-4bit", function="training:measure_quantized", limit_s=75,
        needs=(*_TRAINING, "bitsandbytes"), options={"quantization": "4bit"},
    ),
    Step(
        name="train-8bit", function="training:measure_quantized", limit_s=75,
        needs=(*_TRAINING, "bitsandbytes"), options={"quantization": "8bit"}, gpu_only=True,
    ),
    Step(
        name="train-flash", function="training:measure_attention", limit_s=75,
        needs=(*_TRAINING, "flash_attn"), options={"attn_implementation": "flash_attention_2"}, gpu_only=True,
    ),
    Step(name="vllm", function="engine:measure_vllm", limit_s=120, needs=("vllm",)),
)  # fmt: skip

AIMS = {
    ("engine-7b", "share_of_limit"): 0.45,
    ("engine-7b", "times_generate_padded"): 5.0,
    ("train-lora", "share_of_products_rate"): 0.40,
    ("train-lora", "times_plain_trl"): 1.3,
    ("pipeline", "share_of_bare_engine"): 0.95,
}
"""What is hoped for at full scale on one H100, by step and figure."""
