"""What an engine knows of memory: how to keep it, how much there is, and when it ran out."""

from __future__ import annotations

import ctypes
import gc
import platform
from typing import Any

import torch
from transformers import PreTrainedConfig

CPU_BATCH_TOKENS = 16_384
"""Prompt tokens of a batch on a CPU: larger batches are no faster there, and take memory from others."""

_USABLE = 0.8  # of the free memory of a GPU; the rest is for kernels' workspaces, fragments and long answers
_WIDTH = ("hidden_size", "embed_dim")  # in text models, in some towers
_INNER_WIDTH = ("intermediate_size", "ffn_dim", "mlp_dim")
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


def limit_memory(fraction: float) -> None:
    """Keep this process to a fraction of its GPU's memory; the rest is for others on the same card."""
    if fraction < 1 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(fraction)


def find_batch_tokens(model: Any, fraction: float = 1.0) -> int:
    """Return how many prompt tokens a batch may have, by the memory that is free beside the model.

    Args:
        model: On its device.
        fraction: What `limit_memory` was told.
    """
    if model.device.type != "cuda":
        return CPU_BATCH_TOKENS
    free, total = torch.cuda.mem_get_info(model.device)
    allocated = torch.cuda.memory_allocated(model.device)
    unused = torch.cuda.memory_reserved(model.device) - allocated
    usable = _USABLE * min(free + unused, fraction * total - allocated)
    per_token = bytes_per_token(model.config, model.dtype.itemsize)
    return max(1, int(usable / per_token)) if per_token else CPU_BATCH_TOKENS


def bytes_per_token(config: Any, itemsize: int) -> int:
    """Estimate what a prompt token takes at the peak of a forward pass.

    That is its keys and values in all layers, its activations in one layer of the language model, and those
    of its patches in one layer of the vision tower. A tower whose config tells no sizes (some wrap one of
    another library) counts as none.

    Args:
        config: Of a decoder-only image-text-to-text model.
        itemsize: Bytes of a number.

    Returns:
        Bytes; 0 where the config tells no sizes at all.
    """
    text, vision = config.get_text_config(), getattr(config, "vision_config", None)
    patches = (_largest(vision, "spatial_merge_size") or 1) ** 2
    return itemsize * (_cached(text) + _activations(text) + patches * _activations(vision))


def cached_share(config: Any) -> float:
    """Estimate the share of `bytes_per_token` that a copy of a token takes: its keys and values alone."""
    return _cached(config.get_text_config()) / bytes_per_token(config, 1)


def is_out_of_memory(error: Exception) -> bool:
    """Tell running out of memory from other failures: three exceptions and several texts mean it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("DefaultCPUAllocator: can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def is_broken_device(error: Exception) -> bool:
    """Tell what no later pass recovers from: what a GPU reports, other than running out of memory."""
    is_reported = isinstance(error, torch.AcceleratorError) or str(error).startswith("CUDA error")
    return is_reported and not is_out_of_memory(error)


def empty_cache() -> None:
    """Free what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _cached(config: Any) -> int:
    """Numbers that a token leaves in the cache of all layers."""
    num_heads = _largest(config, "num_attention_heads") or 1
    head_dim = _largest(config, "head_dim") or _largest(config, *_WIDTH) // num_heads
    num_cached = _largest(config, "num_key_value_heads") or num_heads
    return 2 * _largest(config, "num_hidden_layers") * num_cached * head_dim


def _activations(config: Any) -> int:
    """Numbers of a token at a time in a layer: residual, normalised, attention, and the MLP's inner ones."""
    width = _largest(config, *_WIDTH)
    return 6 * width + 3 * (_largest(config, *_INNER_WIDTH) or 4 * width)


def _largest(config: Any, *names: str) -> int:
    """Return the largest number that a config has under any of some names, 0 if none.

    What differs by layer is a list in some configs and in others a config of its own, and a tower may be
    made of several: whatever is nested counts.
    """
    if isinstance(config, PreTrainedConfig):
        return max(_largest(config.to_dict(), *names), *(_own(config, name) for name in names))
    if isinstance(config, dict):
        nested = [_largest(value, *names) for value in config.values() if isinstance(value, dict)]
        return max([*nested, *(_number(config.get(name)) for name in names)])
    return 0


def _own(config: PreTrainedConfig, name: str) -> int:
    """Read a number by what transformers calls it, whatever this kind of config does."""
    try:
        return _number(getattr(config, name, None))
    except RuntimeError:  # it differs by layer; `to_dict` has all
        return 0


def _number(value: Any) -> int:
    if isinstance(value, list | tuple):
        return max(map(_number, value), default=0)
    return value if isinstance(value, int) else 0
