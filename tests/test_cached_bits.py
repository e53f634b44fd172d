"""Bits of cached steps: equal to diffusers with its MagCache and the same ratios, whatever the cut and the company."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cache_oracle
import numpy as np
import pytest
from oracle import Checkpoint, assert_equal
from test_parity import DTYPES, picture

from cineline import Engine, ParallelConfig, VideoRequest
from cineline.core.config import Dtype
from cineline.families.wan.job import WanJob
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind


def drawn(seed: int, steps: int) -> list[float]:
    """Ratios close to 1."""
    return [1.0, *(1 + 0.03 * np.random.default_rng(seed).standard_normal(steps - 1)).tolist()]


RATIOS = {
    "transformer": {"cond": drawn(1, 12), "uncond": drawn(2, 12)},
    "transformer_2": {"cond": drawn(3, 7), "uncond": drawn(4, 7)},
}
"""By expert and branch: other numbers of steps than those of any request."""

MEANS = [[(one + other) / 2 for one, other in zip(*RATIOS[name].values(), strict=True)] for name in RATIOS]


def with_ratios(plain: Path, folder: Path, measured: Any = RATIOS) -> Path:
    """The checkpoint, with the file beside it."""
    folder.mkdir()
    for entry in plain.iterdir():
        (folder / entry.name).symlink_to(entry)
    (folder / "cineline-cache.json").write_text(json.dumps({"mag": measured}))
    return folder


def several(kind: WanKind) -> list[VideoRequest]:
    """Thresholds, steps, sizes, guidance by both experts, one or none, images, both ways to switch, and no cache."""
    common: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "guidance_scale": 3.0, "cache": "mag"}
    image = {"image": picture(70, 90, seed=1)} if kind != "t2v" else {}
    required = image if kind == "i2v" else {}
    switch = {"switch_step": 3, "guidance_scale_2": 1.0} if kind != "ti2v" else {}
    own: list[dict[str, Any]] = [
        image | {"num_inference_steps": 10},
        required | {"num_inference_steps": 8, "cache": "mag:0.2", "height": 96, "seed": 3} | switch,
        required | {"num_inference_steps": 6, "guidance_scale": 1.0, "cache": "mag:0.5", "num_frames": 9, "seed": 5},
        required | {"num_inference_steps": 4, "cache": None},
    ]
    return [VideoRequest(prompt=f"{number} cats", **common | fields) for number, fields in enumerate(own)]


@cache
def expected(folder: Path, dtype: Dtype, kind: WanKind) -> list[Any]:
    return [
        cache_oracle.run(folder, dtype, request.model_copy(update={"cache": None}), MEANS, threshold_of(request))
        for request in several(kind)
    ]


def threshold_of(request: VideoRequest) -> float:
    """0 skips nothing."""
    return 0.0 if request.cache is None else float(request.cache.removeprefix("mag:"))


def assert_alike(
    folder: Path, cached: Path, kind: WanKind, dtype: Dtype, parallel: ParallelConfig, requests: Sequence[VideoRequest]
) -> None:
    with Engine(cached, parallel, dtype=dtype, device="cpu", in_flight=3) as engine:
        handles = [engine.submit(request) for request in requests]
        for handle, (one, computed) in zip(handles, expected(folder, dtype, kind), strict=True):
            assert_equal(handle.result(120), one)
            job = handle.job
            assert isinstance(job, WanJob)
            assert sum(computed) == (job.steps - len(job.skipped)) * job.branches
            assert bool(job.skipped) == (job.cache is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("ti2v", ParallelConfig()),
        ("t2v", ParallelConfig(pp=2)),
        ("i2v", ParallelConfig(pp=4)),
        ("ti2v", ParallelConfig(pp=2, cfg=2)),
        ("i2v", ParallelConfig(cfg=2)),
        ("t2v", ParallelConfig(pp=3, expert_placement="split")),
        ("i2v", ParallelConfig(pp=3, cfg=2, expert_placement="split")),
    ],
)
def test_skipped_steps_in_company_equal_diffusers(
    kind: WanKind, dtype: Dtype, parallel: ParallelConfig, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = checkpoint(RandomConfig(kind, seed=3))
    assert_alike(folder, with_ratios(folder, tmp_path / "model"), kind, dtype, parallel, several(kind))
