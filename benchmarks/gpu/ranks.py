"""Engines with ranks that share the device, through host memory: their latents and frames against one rank's."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.random_wan import random_spec
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.media.result import Video

LIMIT_S = 400.0
ARMS = (ParallelConfig(), ParallelConfig(pp=2), ParallelConfig(pp=2, vae_decode="rows"))


def measure(model: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows: seconds of two requests in flight, of two steps each, decoded."""
    small = device.type == "cpu"
    height, width, frames = (64, 96, 5) if small else (704, 1280, 17)
    config = DeviceConfig(device.type, "float32" if small else "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        spec = random_spec(model, Path(folder), small)
        request = VideoRequest(prompt="a video", height=height, width=width, num_frames=frames, num_inference_steps=2)
        whole: list[Video] = []
        for parallel in ARMS:
            begun = time.monotonic()
            with Engine(spec, parallel, **asdict(config)) as engine:
                ready = time.monotonic()
                engine.submit(request.model_copy(update={"num_inference_steps": 1})).result(LIMIT_S)
                started = time.monotonic()
                handles = [engine.submit(request.model_copy(update={"seed": seed})) for seed in range(2)]
                videos = [handle.result(LIMIT_S) for handle in handles]
                seconds = time.monotonic() - started
            whole = whole or videos
            row: dict[str, Any] = {"arm": f"{parallel}, {parallel.vae_decode}", "seconds": (seconds,) * 3}
            row["ready_s"] = round(ready - begun, 1)
            row["equal"] = all(torch.equal(a.latents, b.latents) for a, b in zip(videos, whole, strict=True))
            row["deviation"] = max(_grey_levels(a, b) for a, b in zip(videos, whole, strict=True))
            yield row


def _grey_levels(one: Video, other: Video) -> int:
    assert one.frames is not None and other.frames is not None
    return int(np.abs(one.frames.astype(int) - other.frames.astype(int)).max())
