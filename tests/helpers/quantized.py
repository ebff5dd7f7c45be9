"""Checkpoints as quantizers write them, 4 bits a weight, and the plain weights that their numbers mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP_SIZE = 64
"""Weights, of those that one output sums up, that have a scale in common."""

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of eight neighbours AWQ puts into which four bits."""

_CONFIGS = {
    "awq": {"zero_point": True, "version": "gemm", "modules_to_not_convert": ["visual"]},
    "gptq": {"sym": True, "desc_act": False},
}


def quantize(method: str, base: Path, folder: Path, twin: Path) -> None:
    """Write a model with its language model quantized, and the same as plain weights.

    Args:
        method: `awq` or `gptq`.
        base: Checkpoint folder.
        folder: Where the quantized one goes.
        twin: Where the plain one goes.
    """
    quantized, plain = {}, {}
    for name, weight in load_file(base / "model.safetensors").items():
        if not (name.startswith("model.layers.") and name.endswith("_proj.weight")):
            quantized[name] = plain[name] = weight
            continue
        found, plain[name] = _METHODS[method](weight)
        quantized |= {name.replace("weight", kind): value.contiguous() for kind, value in found.items()}
    config = json.loads((base / "config.json").read_text())
    about = {"quant_method": method, "bits": 4, "group_size": GROUP_SIZE, **_CONFIGS[method]}
    _write(base, folder, quantized, config | {"quantization_config": about})
    _write(base, twin, plain, config)


def _write(base: Path, folder: Path, weights: dict[str, Tensor], config: dict[str, object]) -> None:
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def _awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = _groups(weight)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(0, 15)
    numbers = (groups / scales + zeros).round().clamp(0, 15)
    packed = {
        "qweight": _pack(numbers.flatten(0, 1), _AWQ_ORDER),
        "qzeros": _pack(zeros.squeeze(1), _AWQ_ORDER),
        "scales": scales.squeeze(1),
    }
    return packed, _plain((numbers - zeros) * scales, weight)


def _gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = _groups(weight)
    scales = (groups.abs().amax(1, keepdim=True) / 7).half()
    numbers = (groups / scales + 8).round().clamp(0, 15)
    one_less = torch.full_like(scales.squeeze(1), 7)  # of eight, the middle
    packed = {
        "qweight": _pack(numbers.flatten(0, 1).T, range(8)).T,
        "qzeros": _pack(one_less, range(8)),
        "scales": scales.squeeze(1),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP_SIZE,
    }
    return packed, _plain((numbers - 8) * scales, weight)


def _groups(weight: Tensor) -> Tensor:
    """Return weights by group, input and output, in float32."""
    return weight.float().T.reshape(-1, GROUP_SIZE, len(weight))


def _plain(groups: Tensor, weight: Tensor) -> Tensor:
    return groups.flatten(0, 1).T.to(weight.dtype).contiguous()


def _pack(numbers: Tensor, order: list[int] | range) -> Tensor:
    """Put eight neighbours of the last dimension into an int32 each, the first of the order lowest."""
    eights = numbers.to(torch.int64).unflatten(-1, (-1, 8))[..., list(order)]
    packed = (eights << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


_METHODS: dict[str, Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]] = {"awq": _awq, "gptq": _gptq}
