"""Attention of a vision tower over packed sequences, its windows and images, in few calls.

Shapes: `T` patches of all sequences, one after the other; `L` of one of them; `H` heads of width `D`.
"""

from __future__ import annotations

from itertools import groupby, product
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from vlmray.engines.transformers.linear import multiply, onednn_speed_up
from vlmray.models.families import family_of

_NAME = "packed_sdpa_as_flash"  # a "flash" in it makes transformers pass sequences packed, not one by one
_BLOCK = 512  # queries at once: few enough for their weights to stay in the processor's cache
_LEAST_PRODUCTS = 2**23  # scalar ones of queries and keys; for fewer, the calls themselves take longer
_LEAST_SPEED_UP = 2.0  # of oneDNN; at 1.4 SDPA takes less time, as it writes no weights to memory


def pack_attention(model: Any) -> None:
    """Let the tower of a model attend in few calls, where transformers would make one for each window.

    Nothing changes for a tower that is not known, or that uses something else than SDPA.
    """
    config = model.config
    packs = family_of(config).packs_attention
    if packs and config.vision_config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, attend_packed)
        config.vision_config._attn_implementation = _NAME


def attend_packed(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float,
    cu_seq_lens_q: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Let each patch attend to those of its own sequence; an attention function as transformers calls it.

    Args:
        module: The layer; not used.
        query: (1, H, T, D).
        key: (1, H, T, D).
        value: (1, H, T, D).
        attention_mask: None; the lengths say it all.
        scaling: Of the products of queries and keys.
        cu_seq_lens_q: Where sequences start, and the end of the last.
        **kwargs: Of other attention functions.

    Returns:
        (1, T, H, D), and None for the weights.
    """
    packed = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (T, H, D)
    output = torch.empty_like(packed[0])
    start = 0
    for length, run in groupby(cu_seq_lens_q.diff().tolist()):
        end = start + length * len(list(run))
        q, k, v = (tensor[start:end].unflatten(0, (-1, length)).transpose(1, 2) for tensor in packed)
        output[start:end] = _attend(q, k, v, scaling).transpose(1, 2).flatten(0, 1)
        start = end
    return output[None], None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attend within sequences of one length: (sequences, H, L, D) each."""
    is_plain = query.device.type == "cpu" and query.dtype == torch.float32 and not torch.is_grad_enabled()
    is_large = query.shape[2] ** 2 * query.shape[3] >= _LEAST_PRODUCTS
    if is_plain and is_large and onednn_speed_up() >= _LEAST_SPEED_UP:
        return _attend_in_blocks(query, key, value, scaling)
    return scaled_dot_product_attention(query, key, value, scale=scaling)


def _attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Do the same by oneDNN, for one head and a block of its queries after the other."""
    output = torch.empty_like(query)
    for place in product(range(query.shape[0]), range(query.shape[1])):
        keys, values = key[place].contiguous(), value[place].t().contiguous()
        for queries, into in zip(query[place].split(_BLOCK), output[place].split(_BLOCK), strict=True):
            weights = multiply(queries * scaling, keys).softmax(-1)
            into.copy_(multiply(weights, values))
    return output
