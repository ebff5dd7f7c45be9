"""What machine this is, and how fast it is at what models do most."""

from __future__ import annotations

import subprocess
import time

import torch

from benchmarks.common.limit import measure_products
from benchmarks.gpu.setting import Figures, Setting


def describe(setting: Setting) -> Figures:
    """Name the device, and measure its matrix products and its memory."""
    if setting.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        yield "driver", subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        yield "memory_gib", torch.cuda.get_device_properties(0).total_memory / 2**30
        yield "copy_tb_per_s", _copy_rate() / 1e12
    for dtype in ("float32", "bfloat16"):
        yield f"{dtype}_products_tflop_per_s", measure_products(setting.device, dtype) / 1e12


def _copy_rate() -> float:
    """Return bytes read and written per second by a copy on the card: the best of several."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.numel() / best
