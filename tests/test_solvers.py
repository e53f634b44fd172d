"""Bits of every schedule: solvers, noise levels, named noise, a switch by number, against diffusers driven alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import solver_oracle
import torch
from diffusers import DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, FlowMatchEulerDiscreteScheduler
from oracle import Checkpoint, assert_equal
from test_parity import DTYPES, KINDS, picture

from cineline import Engine, ParallelConfig, VideoRequest
from cineline.core.config import Dtype
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind

LEVELS = (1.0, 0.75, 0.5, 0.25)


def several(kind: WanKind) -> list[VideoRequest]:
    """A request of each solver, with and without noise levels, guidance, image, and both ways to switch."""
    common: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "guidance_scale": 3.0}
    image = {"image": picture(70, 90, seed=1)} if kind != "t2v" else {}
    required = image if kind == "i2v" else {}
    half = {"switch_step": 2} if kind != "ti2v" else {}
    second = {"guidance_scale_2": 2.0} if kind != "ti2v" else {}
    own: list[dict[str, Any]] = [
        image | half | {"solver": "euler", "sigmas": LEVELS, "flow_shift": 5.0, "guidance_scale": 1.0},
        required | second | {"solver": "unipc", "sigmas": (1.0, 0.8, 0.3), "seed": 2**40},
        required | half | {"solver": "dpm++", "num_inference_steps": 5, "seed": 3},
        image | second | half | {"solver": "lcm", "sigmas": LEVELS, "seed": 5, "num_frames": 9},
        required | {"solver": "lcm", "num_inference_steps": 3, "seed": 2**63 - 1},
        required | half | {"solver": "euler", "num_inference_steps": 6, "flow_shift": 2.0},
        required | half | {"num_inference_steps": 4},
    ]
    return [VideoRequest(prompt=f"{number} cats", **common | fields) for number, fields in enumerate(own)]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_in_company_equals_diffusers(
    kind: WanKind, dtype: Dtype, stages: int, checkpoint: Checkpoint
) -> None:
    assert_alike(checkpoint(RandomConfig(kind, seed=3)), ParallelConfig(pp=stages), dtype, several(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("ti2v", ParallelConfig(pp=2, cfg=2)),
        ("t2v", ParallelConfig(pp=2, cfg=2)),
        ("t2v", ParallelConfig(pp=3, expert_placement="split")),
        ("i2v", ParallelConfig(pp=2, cfg=2, expert_placement="split")),
    ],
)
def test_two_lines_and_split_experts_equal_diffusers(
    kind: WanKind, dtype: Dtype, parallel: ParallelConfig, checkpoint: Checkpoint
) -> None:
    assert_alike(checkpoint(RandomConfig(kind, seed=3)), parallel, dtype, several(kind))


def assert_alike(folder: Path, parallel: ParallelConfig, dtype: Dtype, requests: list[VideoRequest]) -> None:
    with Engine(folder, parallel, dtype=dtype, device="cpu", in_flight=3) as engine:
        handles = [engine.submit(request) for request in requests]
        expected = [solver_oracle.run(folder, dtype, request) for request in requests]
        for handle, one in zip(handles, expected, strict=True):
            assert_equal(handle.result(120), one)


NOISY = [
    (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    *(
        (solver, {"algorithm_type": "sde-dpmsolver++", "prediction_type": "flow_prediction", "use_flow_sigmas": True})
        for solver in (DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler)
    ),
]


def with_solver(plain: Path, folder: Path, solver: type[Any], config: dict[str, Any]) -> Path:
    """A checkpoint with another scheduler."""
    shutil.copytree(plain, folder)
    solver(**config).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", solver.__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("solver", "config"), NOISY)
def test_a_checkpoints_solver_that_adds_noise_equals_diffusers(
    solver: type[Any], config: dict[str, Any], dtype: Dtype, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = with_solver(checkpoint(RandomConfig("t2v", seed=3)), tmp_path / "noisy", solver, config)
    request = several("t2v")[-1].model_copy(update={"switch_step": 1})
    assert_alike(folder, ParallelConfig(pp=2), dtype, [request])


def test_noise_is_named_by_seed_and_step() -> None:
    """Drawn once with the rule as the docs have it; another torch may draw other numbers, and then bits change."""
    drawn = torch.rand(2, generator=solver_oracle.generator_of(7, 2))
    from cineline.families.wan.denoise import noise_generator

    assert torch.equal(torch.rand(2, generator=noise_generator(7, 2)), drawn)
    others = [torch.rand(2, generator=noise_generator(seed, step)) for seed, step in ((2, 7), (7, 3), (8, 2), (72, 0))]
    assert not any(torch.equal(other, drawn) for other in others)
