"""What an engine knows of memory: how to keep it, how much there is, and when it ran out."""

from __future__ import annotations

import ctypes
import gc
import platform
from typing import Any

import torch

CPU_BATCH_TOKENS = 16_384
"""Prompt tokens of a batch on a CPU: larger batches are no faster there, and take memory from others."""

_USABLE = 0.8  # of the free memory of a GPU; the rest is for kernels' workspaces, fragments and long answers
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # from malloc.h


def keep_freed_memory() -> None:
    """Make this process keep the memory that it frees, for what it allocates next.

    glibc gives large blocks back to the kernel, which has to clear their pages when they are asked for
    again: for the activations of a model on a CPU that is a fifth of the time. Other C libraries are left
    alone.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)  # arenas of threads hold no large blocks
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def find_batch_tokens(model: Any) -> int:
    """Return how many prompt tokens a batch may have, by the memory that is free beside the model."""
    if model.device.type != "cuda":
        return CPU_BATCH_TOKENS
    free, _ = torch.cuda.mem_get_info(model.device)
    free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    return max(1, int(_USABLE * free / bytes_per_token(model.config, model.dtype.itemsize)))


def bytes_per_token(config: Any, itemsize: int) -> int:
    """Estimate what a prompt token takes at the peak of a forward pass.

    That is its keys and values in all layers, its activations in one layer of the language model, and those
    of its patches in one layer of the vision tower.

    Args:
        config: Of an image-text-to-text model.
        itemsize: Bytes of a number.
    """
    text, vision = config.get_text_config(), config.vision_config
    patches = getattr(vision, "spatial_merge_size", 1) ** 2
    return int(itemsize * (_cached(text) + _activations(text) + patches * _activations(vision)))


def cached_share(config: Any) -> float:
    """Estimate the share of `bytes_per_token` that a copy of a token takes: its keys and values alone."""
    return _cached(config.get_text_config()) / bytes_per_token(config, 1)


def is_out_of_memory(error: Exception) -> bool:
    """Tell running out of memory from other failures: three exceptions and several texts mean it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("DefaultCPUAllocator: can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def empty_cache() -> None:
    """Free what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cached(config: Any) -> int:
    """Numbers that a token leaves in the cache of all layers."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim)


def _activations(config: Any) -> int:
    """Numbers of a token at a time in a layer: residual, normalised, attention, and the MLP's inner ones."""
    return 6 * config.hidden_size + 3 * getattr(config, "intermediate_size", 4 * config.hidden_size)
