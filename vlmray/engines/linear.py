"""Linear layers in oneDNN's kernels, for processors on which those of MKL are far slower.

torch multiplies float32 matrices with MKL, which is Intel's. On an AMD processor with AVX-512, oneDNN, which
torch brings along too, takes about half the time.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import nn

_LEAST_PRODUCTS = 2**21  # scalar ones; for fewer, the call itself takes longer than MKL's whole


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
    if not is_onednn_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.__class__ = OneDnnLinear  # its weights, hooks and adapters stay as they are


@functools.cache
def is_onednn_faster() -> bool:
    """Tell whether this processor has AVX-512 and another maker than Intel."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    described = Path("/proc/cpuinfo")
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and described.exists()
        and "GenuineIntel" not in described.read_text()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not among torch's public ones
    )
