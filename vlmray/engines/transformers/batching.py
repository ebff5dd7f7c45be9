"""Which rows go through the model next, counted in tokens; it knows no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from vlmray.engines.transformers.in_flight import InFlight
from vlmray.images.decoding import image_size

_PIXELS_PER_TOKEN = 28 * 28  # a guess for ordering rows, where the image processor does not tell


class Batcher:
    """Puts rows in order and cuts them into batches.

    Args:
        batch_size: Most rows of a batch.
        max_batch_tokens: Most prompt tokens of a batch, padding included; a longer row goes alone. A
            beginning that rows share counts once, and for each of the others what its copy takes.
        copied_share: What a copied token takes, as a share of one that goes through the model.
    """

    def __init__(self, batch_size: int, max_batch_tokens: int, copied_share: float = 1.0) -> None:
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self._copied_share = copied_share

    def sort(self, rows: list[InFlight]) -> None:
        """Put the longest first, next to those with the same beginning.

        The largest batch comes while memory is least fragmented, and fails early.
        """
        first: dict[Any, InFlight] = {}  # the longest of each beginning
        for row in sorted(rows, key=lambda row: -row.num_tokens):
            first.setdefault(row.head or row.index, row)

        def place(row: InFlight) -> tuple[int, int, int, int]:
            leader = first[row.head or row.index]
            return row.group, -leader.num_tokens, leader.index, -row.num_tokens

        rows.sort(key=place)

    def take(self, queue: deque[InFlight]) -> list[InFlight]:
        """Pop the next rows: at least one, as many as rows and tokens of a batch allow."""
        batch = [queue.popleft()]
        while queue and len(batch) < self.batch_size:
            if self.count_tokens([*batch, queue[0]]) > self.max_batch_tokens:
                break
            batch.append(queue.popleft())
        return batch

    def count_tokens(self, rows: Sequence[InFlight]) -> int:
        """Count the prompt tokens of a batch, padding included; copies of a beginning by what they take."""
        longest = max(row.num_tokens for row in rows)
        num_first = len({row.head for row in rows}) if have_common_heads(rows) else len(rows)
        copy = self._copied_share * longest + max(row.num_tail_tokens for row in rows)
        return longest * num_first + int(copy * (len(rows) - num_first))

    def remember_failure(self, rows: Sequence[InFlight]) -> None:
        """Make later batches smaller than half of one that did not fit into memory."""
        self.max_batch_tokens = min(self.max_batch_tokens, self.count_tokens(rows) // 2)


def have_common_heads(rows: Sequence[InFlight]) -> bool:
    """Tell whether all rows have a beginning, and some the same."""
    heads = {row.head for row in rows}
    return None not in heads and len(heads) < len(rows)


def count_visual_tokens(processor: Any, image: Image | bytes) -> int:
    """Count the tokens that an image takes in a prompt, by its size; a guess for some processors."""
    width, height = image_size(image)
    image_processor = processor.image_processor
    if hasattr(image_processor, "merge_size"):
        patches = image_processor.get_number_of_image_patches(height, width, {})
        return int(patches) // image_processor.merge_size**2
    try:
        counts = processor._get_num_multimodal_tokens(image_sizes=[[height, width]])
    except (AttributeError, NotImplementedError):
        return max(1, width * height // _PIXELS_PER_TOKEN)
    return int(counts["num_image_tokens"][0])
