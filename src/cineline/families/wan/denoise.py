"""Denoising as pure functions of a request: timesteps, expert choice, guidance.

The solver is diffusers' own scheduler object, one a request: a multistep solver keeps a history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cineline.core.request import Branch, Job
from cineline.errors import CheckpointError


@dataclass(frozen=True)
class Step:
    """One solver step.

    Attributes:
        timestep: int64 or float32 scalar tensor, as the solver gives it.
        expert: 0 (high noise) or 1 (low noise).
        guidance: classifier-free guidance scale; used when the job has two branches.
    """

    timestep: torch.Tensor
    expert: int
    guidance: float


def make_solver(class_name: str, config: Mapping[str, Any], job: Job, device: torch.device) -> Any:
    """A diffusers scheduler, ready for the job's first step.

    `flow_shift` replaces the parameter of that meaning: `shift` of Euler, `flow_shift` of the others.

    Raises:
        CheckpointError: diffusers has no such scheduler, or one that cannot be stepped this way.
    """
    import diffusers  # late: it takes a second to load, which a family without it need not wait

    solver_class = getattr(diffusers, class_name, None)
    if solver_class is None:
        raise CheckpointError(f"The checkpoint's scheduler {class_name!r} is not in diffusers {diffusers.__version__}.")
    shift = {}
    if job.flow_shift is not None:
        shift = {"shift" if class_name.startswith("FlowMatch") else "flow_shift": job.flow_shift}
    solver = solver_class.from_config(dict(config), **shift)
    solver.set_timesteps(job.steps, device=device)
    if len(solver.timesteps) != job.steps:
        raise CheckpointError(
            f"{class_name} makes {len(solver.timesteps)} timesteps of {job.steps} steps: "
            "use a solver with one forward a step, such as UniPCMultistepScheduler."
        )
    solver.set_begin_index(0)
    return solver


def make_steps(solver: Any, job: Job) -> list[Step]:
    """Timestep, expert and guidance of every step (as in diffusers' `WanPipeline.__call__`)."""
    boundary = None if job.boundary_ratio is None else job.boundary_ratio * solver.config.num_train_timesteps
    steps = []
    for timestep in solver.timesteps:
        expert = 0 if boundary is None or timestep >= boundary else 1
        guidance = job.guidance_scale if expert == 0 else job.guidance_scale_2
        assert guidance is not None
        steps.append(Step(timestep, expert, guidance))
    return steps


def history_of(solver: Any) -> list[torch.Tensor]:
    """The tensors of latents' shape that a diffusers scheduler keeps between steps, in a fixed order."""
    kept: list[torch.Tensor] = []
    for _, value in sorted(vars(solver).items()):
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1:
                kept.append(tensor)
    return kept


def rehearse(solver: Any, steps: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bring a new solver where that many steps of predictions of this dtype bring it; its history's values are
    not theirs, but it has their shapes, and what it counts is right."""
    for timestep in solver.timesteps[:steps]:
        prediction = torch.zeros(shape, device=timestep.device, dtype=dtype)
        solver.step(prediction, timestep, torch.zeros(shape, device=timestep.device), return_dict=False)


def combine(predictions: Mapping[Branch, torch.Tensor], guidance: float) -> torch.Tensor:
    """Classifier-free guidance, uncond + g (cond - uncond) (Ho & Salimans 2022, arXiv 2207.12598)."""
    cond = predictions[Branch.COND]
    if Branch.UNCOND not in predictions:
        return cond
    uncond = predictions[Branch.UNCOND]
    return uncond + guidance * (cond - uncond)
