"""What a frozen vision tower makes of images in training: computed once for each image, and kept on disk.

    collator   text, images -> VisionCache.encode_text -> row: keys, and pixels unless they are known
    trainer    batch        -> VisionCache.encode      -> batch with the tower's outputs in the pixels' place

Nothing in the tower is trained, so no gradient goes through it, and an image that comes again is neither
preprocessed nor encoded again.

Shapes: `I` images, `P` patches of those that are not known.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image

from vlmray.models.adapters import base_of
from vlmray.models.families import family_of
from vlmray.models.inputs import check_placeholders, special_token_options
from vlmray.models.prompts import ChatPrompts
from vlmray.models.vision import count_levels, encode_images, replace_pixels

logger = logging.getLogger(__name__)

_SPARED = 0.1  # share of the disk that is left free
_KEYS, _KNOWN = "image_keys", "image_known"


@dataclass(frozen=True, slots=True)
class _Kept:
    """Where the features of an image lie in the file."""

    offset: int
    shape: torch.Size
    """Visual tokens, and the width of the language model."""

    dtype: torch.dtype
    grid: torch.Tensor
    """(3,) patches in time, height and width."""


class VisionCache:
    """Features of images by their pixels, in a file without a name that goes with the process.

    Args:
        model: The base model, of a type that passes encoder outputs on.
        limit_bytes: Most bytes to keep; what comes later is encoded every time. A tenth of the disk is left
            free in any case.
    """

    def __init__(self, model: Any, limit_bytes: float) -> None:
        self._model = model
        self._limit = limit_bytes
        self._file = tempfile.TemporaryFile(prefix="vlmray-vision-")  # noqa: SIM115  # open as long as this
        self._size = 0
        self._kept: dict[bytes | None, _Kept] = {}
        self.num_images = 0
        """Images that were asked for."""

        self.num_encoded = 0
        """Images that went through the tower."""

    @classmethod
    def of(cls, model: Any, limit_bytes: float) -> VisionCache | None:
        """Return a cache for a model that is about to be trained, or None where its tower is trained too."""
        base = base_of(model)
        family = family_of(base.config)
        if not family.takes_image_features:
            return None
        is_frozen = not any(parameter.requires_grad for parameter in family.vision_tower(base).parameters())
        return cls(base, limit_bytes) if is_frozen else None

    def encode_text(
        self, prompts: ChatPrompts, text: str, images: Sequence[Image], *, continues: bool = False
    ) -> dict[str, torch.Tensor]:
        """Encode as `ChatPrompts.encode` does, but without pixels where all features are kept.

        Returns:
            Token-wise tensors (1, T), `image_grid_thw` (I, 3), `image_keys` (I, 2), `image_known` (I,), and
            `pixel_values` (P, ...) unless all are known.
        """
        keys = [_key(image) for image in images]
        kept = [self._kept[key] for key in keys if key in self._kept]
        processor = prompts.processor_for(text)
        places = text.split(processor.image_token)
        is_known = 0 < len(kept) == len(images) == len(places) - 1
        if is_known:
            tokens = [processor.image_token * each.shape[0] for each in kept]
            text = places[0] + "".join(map(str.__add__, tokens, places[1:]))
            options = special_token_options(processor.tokenizer, text, continues=continues)
            row = dict(processor(text=[text], return_tensors="pt", **options))
            row["image_grid_thw"] = torch.stack([each.grid for each in kept])
            check_placeholders(processor, row)
        else:
            row = prompts.encode(text, images, continues=continues)
        if images:
            row[_KEYS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.int64).view(-1, 2)
            row[_KNOWN] = torch.tensor([is_known] * len(images))
        return row

    def encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Put the tower's outputs in the place of pixels, and keep them where the batch names its images.

        Args:
            batch: Of rows from `encode_text`, or of ordinary ones, on the model's device.
        """
        grids = batch.get("image_grid_thw")
        if grids is None:
            return batch
        names = batch.pop(_KEYS, None)
        known = batch.pop(_KNOWN, torch.zeros(len(grids), dtype=torch.bool)).tolist()
        keys = [None] * len(grids) if names is None else [name.tobytes() for name in names.cpu().numpy()]
        sizes = [
            0 if is_known else size for is_known, size in zip(known, grids.prod(-1).tolist(), strict=True)
        ]
        pixels = batch.get("pixel_values", grids[:0]).split(sizes)
        features = [self._features(*image) for image in zip(keys, pixels, grids, strict=True)]
        self.num_images += len(features)
        return replace_pixels(batch, features, count_levels(self._model.config))

    def _features(self, key: bytes | None, pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Return what the tower makes of an image: as it was kept, or now."""
        if key in self._kept:
            return self._read(self._kept[key]).to(grid.device)
        with torch.no_grad():  # one alone: what comes out depends on no neighbours, and is no slower
            [features] = encode_images(self._model, pixels, grid[None])
        self.num_encoded += 1
        if key is not None:
            self._keep(key, grid, features)
        return features

    def _keep(self, key: bytes, grid: torch.Tensor, features: torch.Tensor) -> None:
        """Write features to the end of the file; once there is no room for some, no more are kept."""
        if not self._limit:
            return
        data = features.contiguous().cpu()
        reason = self._write(data)
        if reason is None:
            self._kept[key] = _Kept(self._size, data.shape, data.dtype, grid.cpu())
            self._size += data.nbytes
            return
        self._limit = 0
        logger.warning(
            "%d images are kept encoded (%.1f GiB), others are encoded every time: %s",
            len(self._kept), self._size / 2**30, reason,
        )  # fmt: skip

    def _write(self, data: torch.Tensor) -> str | None:
        """Write to the end of the file, or return why not."""
        if self._size + data.nbytes > self._limit:
            return "--vision_cache_gib is used up; raise it to keep more"
        disk = os.fstatvfs(self._file.fileno())
        if disk.f_bavail * disk.f_frsize - data.nbytes < _SPARED * disk.f_blocks * disk.f_frsize:
            return "the disk is full but for a tenth; set TMPDIR to a larger one"
        try:
            written = os.pwrite(self._file.fileno(), data.view(torch.uint8).numpy().data, self._size)
        except OSError as error:
            return f"{error}; set TMPDIR to a larger disk"
        return None if written == data.nbytes else "the disk is full; set TMPDIR to a larger one"

    def _read(self, kept: _Kept) -> torch.Tensor:
        data = bytearray(kept.shape.numel() * kept.dtype.itemsize)
        os.preadv(self._file.fileno(), [data], kept.offset)
        return torch.frombuffer(data, dtype=kept.dtype).view(kept.shape)


def _key(image: Image) -> bytes:
    """Return 16 bytes that tell an RGB image from others."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, person=b"vlmray")
    digest.update(repr(image.size).encode())
    return digest.digest()
