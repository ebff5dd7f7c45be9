"""A key-value cache with room: a new token is written behind the others, and nothing is copied for it.

Shapes: `B` rows, `H` key-value heads, `T` tokens so far, `D` width of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values (B, H, T, D) of one layer of full attention, in buffers that are longer than T.

    transformers' own layer copies all it holds for every token. What the first forward pass brings is kept
    as it is; room is made when rows are selected or more tokens come.

    Args:
        room: Tokens to have room for, whenever there is none left.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of new tokens, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        start, num_new = self.get_seq_length(), key_states.shape[2]
        end = start + num_new
        if self._buffers is None or end > self._buffers[0].shape[2]:
            everything = torch.arange(len(key_states), device=key_states.device)
            self._buffers = self._copy(everything, max(self._room, num_new))
        keys, values = self._buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep rows by their indices (B,); one may be kept several times."""
        length = self.get_seq_length()
        self._buffers = self._copy(indices, self._room)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _copy(self, indices: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy rows to new buffers with room behind them."""
        buffers = []
        for held in (self.keys, self.values):
            assert held is not None
            _, num_heads, length, width = held.shape
            buffers.append(held.new_empty(len(indices), num_heads, length + room, width))
            buffers[-1][:, :, :length] = held[indices]
        return buffers[0], buffers[1]


def make_cache(room: int) -> Cache:
    """Make a cache for a model whose layers all have full attention.

    Args:
        room: Tokens to have room for, after what the first forward pass brings, before it has to grow.
    """
    return Cache(layer_class_to_replicate=functools.partial(RoomyLayer, room))  # type: ignore[arg-type]
