"""Seconds and bytes of work on a device, or on the CPU where there is none."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch


def timed(work: Callable[[], object], device: torch.device, runs: int = 3) -> tuple[float, float, float]:
    """Median, least and most seconds of so many runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(runs):
        wait(device)
        started = time.monotonic()
        work()
        wait(device)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds), min(seconds), max(seconds)


def wait(device: torch.device) -> None:
    """Until the device has done all."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def forget(device: torch.device) -> None:
    """Free what is unused, and count the peak anew."""
    gc.collect()
    if device.type != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float | None:
    """Most 10^9 bytes in tensors since `forget`; None on the CPU, where nobody counts."""
    return None if device.type == "cpu" else round(torch.cuda.max_memory_allocated() / 1e9, 3)
