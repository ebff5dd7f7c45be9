"""A stand-in for NVIDIA's library that asks the driver: cards of some machine, and what they have taken."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Card(NamedTuple):
    uuid: str
    watts: int | None = 400
    """What it takes, since 1970; None: it does not count."""

    name: str = "H200"


_MODULE = """
import time

CARDS = {cards!r}


class NVMLError(Exception):
    pass


def nvmlInit():
    if not CARDS:
        raise NVMLError("Driver Not Loaded")


def nvmlDeviceGetCount():
    return len(CARDS)


def nvmlDeviceGetHandleByIndex(index):
    if index >= len(CARDS):
        raise NVMLError("Invalid Argument")
    return CARDS[index]


def nvmlDeviceGetHandleByUUID(uuid):
    for card in CARDS:
        if card[0] == uuid:
            return card
    raise NVMLError("Not Found")


def nvmlDeviceGetUUID(handle):
    return handle[0]


def nvmlDeviceGetName(handle):
    return handle[2]


def nvmlDeviceGetTotalEnergyConsumption(handle):
    if handle[1] is None:
        raise NVMLError("Not Supported")
    return time.time_ns() * handle[1] // 10**6
"""


def write_nvml(folder: Path, *cards: Card) -> Path:
    """Write the module to a folder; without cards there is no driver."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pynvml.py").write_text(_MODULE.format(cards=[tuple(card) for card in cards]))
    return folder


@contextlib.contextmanager
def installed_nvml(folder: Path, *cards: Card) -> Iterator[None]:
    """Let this process find it for a while."""
    kept = sys.modules.pop("pynvml", None)
    sys.path.insert(0, str(write_nvml(folder, *cards)))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.pop(0)
        sys.modules.pop("pynvml", None)
        if kept is not None:
            sys.modules["pynvml"] = kept
