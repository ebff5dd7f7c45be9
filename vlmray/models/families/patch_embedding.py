"""Patches embedded by a matrix product, where a tower does it by a convolution over each."""

from __future__ import annotations

import functools
from typing import Any

import torch


def embed_patches_by_matmul(model: Any) -> None:
    """Let vision towers of Qwen's kind embed patches with a matrix product.

    Their patches come cut out and flattened, and the convolution over each has the size of the patch: it is
    a linear layer. Called as a convolution it is many times slower, above all backwards.
    """
    for module in model.modules():
        projection = getattr(module, "proj", None)
        if type(module).__name__.endswith("VisionPatchEmbed") and _covers_its_input(module, projection):
            module.forward = functools.partial(_embed_patches, module)


def _covers_its_input(module: Any, projection: Any) -> bool:
    if not isinstance(projection, torch.nn.Conv3d) or projection.groups != 1:
        return False
    if hasattr(module, "_hf_hook") or hasattr(projection, "_hf_hook"):
        return False  # accelerate moves its weights when it is called
    patch = (module.temporal_patch_size, module.patch_size, module.patch_size)
    return projection.kernel_size == projection.stride == patch and projection.padding == (0, 0, 0)


def _embed_patches(module: Any, patches: torch.Tensor) -> torch.Tensor:
    """Embed flattened patches (P, channels x time x height x width); return (P, hidden)."""
    projection = module.proj
    if type(projection) is not torch.nn.Conv3d:  # an adapter was put around it since
        return type(module).forward(module, patches)
    weight = projection.weight.flatten(1)
    return torch.nn.functional.linear(patches.view(-1, weight.shape[1]).to(weight), weight, projection.bias)
