"""Small models with random weights, whole requests: the line on this device against diffusers' pipelines on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cineline.bench.exact import Compared, compare
from cineline.core.config import DeviceConfig, Dtype, ParallelConfig
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec

KINDS: tuple[WanKind, ...] = ("ti2v", "t2v", "i2v")
ARMS = (ParallelConfig(pp=2), ParallelConfig(pp=3, cfg=2))
SPLIT = ParallelConfig(pp=2, expert_placement="split")
IN_FLIGHT = 3


def _lanes() -> tuple[ParallelConfig, ...]:
    """Axes whose ranks need a device each; ring and tp are close to diffusers, not equal."""
    two = torch.accelerator.device_count() >= 2
    return (ParallelConfig(ulysses=2), ParallelConfig(ring=2), ParallelConfig(tp=2)) if two else ()


def measure(dtype: Dtype, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows: of how many requests latents and frames are diffusers', bit for bit."""
    small = device.type == "cpu"
    config = DeviceConfig(device.type, dtype)
    with tempfile.TemporaryDirectory() as temporary:
        for kind in KINDS[:2] if small else KINDS:
            folder = save_random_checkpoint(Path(temporary) / kind, RandomConfig(kind))
            arms = ARMS[:1] if small else (*ARMS, *([SPLIT] if kind == "t2v" else []), *_lanes())
            for row in compare(Compared(WanSpec.open(folder), folder), config, arms, [IN_FLIGHT], print):
                yield {"arm": f"{kind}, {row.axes}"} | asdict(row) | {"equal": row.exact}
