"""Where the host waits for the device in a rank's work, by kind of item: each stops a line's fill for a moment."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.random_wan import RandomStages, random_spec
from benchmarks.gpu.transformer import SMALL_SIZES
from cineline.core.config import DeviceConfig, ParallelConfig, Place
from cineline.core.request import Branch, Kind, VideoRequest, WorkItem
from cineline.families.pipeline_parallel import StagePart
from cineline.schedule.words import Value


def measure(model: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows: waits of an item of each kind on one stage, as torch's sync debug mode tells them; None on the CPU."""
    height, width, frames = SMALL_SIZES[model]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        spec = random_spec(model, Path(folder), small=True)
        job = spec.resolve(
            VideoRequest(prompt="a video", height=height, width=width, num_frames=frames, num_inference_steps=3), 0
        )
        config = DeviceConfig(device.type, "float32" if device.type == "cpu" else "bfloat16")
        parallel = spec.place(ParallelConfig())
        family = RandomStages(spec)
        (cut,) = spec.cut(parallel, config)
        family.load(StagePart(Place(), parallel, cut, device, config))
        found: dict[str, Counter[str]] = {}
        for _ in range(2):  # of the first request's waits some are of libraries that load
            found.clear()
            state = _count("ADMIT", device, found, lambda: family.admit(job, None))
            for kind, work in _items(family, state, job.steps, job.chunks):
                _count(kind, device, found, work)
        for kind, waits in found.items():
            yield {"arm": kind, "waits": None if device.type == "cpu" else sum(waits.values()), "where": dict(waits)}


def _items(family: RandomStages, state: Any, steps: int, chunks: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    def computes(item: WorkItem) -> Callable[[], Any]:
        return lambda: family.compute(state, item, True, True)

    for branch in Branch:
        item = WorkItem(Kind.TEXT, 0, 0, branch)
        yield f"TEXT {branch.name}", computes(item)
        family.take(state, Value.EMBEDDING, item, family.give(state, Value.EMBEDDING, item))
    yield "ENCODE", computes(WorkItem(Kind.ENCODE, 0))
    for step in range(steps):
        for branch in Branch:
            yield f"DENOISE {step} {branch.name}", computes(WorkItem(Kind.DENOISE, 0, step, branch))
        last = WorkItem(Kind.DENOISE, 0, step, Branch.UNCOND)
        yield f"FINISH {step}", partial(family.finish, state, last)
    yield "ANSWER", lambda: family.answer(state, WorkItem(Kind.DENOISE, 0, steps - 1, Branch.UNCOND))
    family.end_denoising(state)
    for chunk in range(chunks):
        yield f"DECODE {chunk}", computes(WorkItem(Kind.DECODE, 0, chunk))
        state.hidden = ()


def _count(kind: str, device: torch.device, found: dict[str, Counter[str]], work: Callable[[], Any]) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            made = work()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    found[kind] = Counter(f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}" for each in waits)
    return made
