"""Linear layers in oneDNN's kernels, for processors on which those of MKL are far slower.

torch multiplies float32 matrices with MKL, which is Intel's. On an AMD processor with AVX-512, oneDNN, which
torch brings along too, takes less time: half of it where the processor's registers are 512 bits wide inside.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import nn

_LEAST_PRODUCTS = 2**21  # scalar ones; for fewer, the call itself takes longer than MKL's whole
_ZEN_5 = 26  # cpu family; Zen 4, of the one before, does 512 bits in two steps


class OneDnnLinear(nn.Linear):
    """An `nn.Linear` in float32 that is not trained: (..., in) to (..., out), as the other to rounding."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        is_small = input.numel() * self.out_features < _LEAST_PRODUCTS
        if is_small or torch.is_grad_enabled() or input.dtype != torch.float32:
            return super().forward(input)
        return multiply(input, self.weight, self.bias)


def multiply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `torch.nn.functional.linear` of float32 tensors on a CPU, by oneDNN; it has no gradient."""
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output


def use_faster_kernels(model: nn.Module) -> None:
    """Turn the linear layers of a model on a CPU into `OneDnnLinear` where that is faster."""
    if onednn_speed_up() == 1:
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = OneDnnLinear  # its weights, hooks and adapters stay as they are


@functools.cache
def onednn_speed_up() -> float:
    """Return how many times as fast as MKL oneDNN is here, as measured for large products; 1 if unknown."""
    described = Path("/proc/cpuinfo")
    if not (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not among torch's public ones
        and described.exists()
    ):
        return 1.0
    text = described.read_text(encoding="utf-8")
    family = re.search(r"^cpu family\s*: (\d+)$", text, re.MULTILINE)
    if "AuthenticAMD" not in text or family is None:
        return 1.0
    return 1.4 if int(family[1]) < _ZEN_5 else 2.1
