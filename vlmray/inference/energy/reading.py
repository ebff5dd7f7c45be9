"""What cards have taken so far, read from NVIDIA's driver where a replica is.

    cards that Ray gave -> Meter -> a reading of each, or none

A driver counts what a whole card takes, whoever works on it, from Volta on. Where it does not, as for a slice
of a card (MIG, vGPU), where there is no driver, or nothing that asks it, nothing is known, and nothing fails.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple


class Reading(NamedTuple):
    """A card's counter at some time."""

    at_s: float
    """Seconds since the epoch."""

    millijoules: int
    """Since the driver was loaded."""

    card: str
    """Its UUID."""


class Meter:
    """The counters of some cards.

    Args:
        cards: As CUDA_VISIBLE_DEVICES names them, by index or UUID.
    """

    def __init__(self, cards: Sequence[str]) -> None:
        self._nvml: Any = None
        self._handles: dict[str, Any] = {}
        if not cards:
            return
        try:
            import pynvml
        except ImportError:
            return
        self._nvml = pynvml
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()  # for the life of this process
            if _counts_as_cuda(pynvml) or not any(map(str.isdecimal, cards)):
                handles = [_find(pynvml, card) for card in cards]
                self._handles = {pynvml.nvmlDeviceGetUUID(handle): handle for handle in handles}

    def read(self) -> tuple[Reading, ...]:
        """Read all of them; nothing where one does not tell."""
        if not self._handles:
            return ()
        with contextlib.suppress(self._nvml.NVMLError):
            return tuple(
                Reading(time.time(), self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle), card)
                for card, handle in self._handles.items()
            )
        return ()


def _find(nvml: Any, card: str) -> Any:
    """Return the driver's handle of a card."""
    if card.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(card))
    return nvml.nvmlDeviceGetHandleByUUID(card)


def _counts_as_cuda(nvml: Any) -> bool:
    """Tell whether CUDA's indices are the driver's, who goes by bus; CUDA begins with the fastest card."""
    if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return True
    handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
    return len({*map(nvml.nvmlDeviceGetName, handles)}) == 1
