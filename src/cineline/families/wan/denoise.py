"""Denoising as pure functions of a request: timesteps, expert choice, what a solver keeps.

The solver is diffusers' own scheduler object, one a request: a multistep solver keeps a history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cineline.errors import CheckpointError, shown
from cineline.families.snapshot import copied
from cineline.families.wan.job import WanJob


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


def make_solver(class_name: str, config: Mapping[str, Any], job: WanJob, device: torch.device) -> Any:
    """A diffusers scheduler, ready for the job's first step.

    `flow_shift` replaces the parameter of that meaning: `shift` of Euler, `flow_shift` of the others.

    Raises:
        CheckpointError: diffusers has no such scheduler, or one that cannot be stepped this way.
    """
    import diffusers  # late: it takes a second to load, which a family without it need not wait

    solver_class = getattr(diffusers, class_name, None)
    if solver_class is None:
        raise CheckpointError(
            f"The checkpoint's scheduler {shown(class_name)} is not in diffusers {diffusers.__version__}."
        )
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


def make_steps(solver: Any, job: WanJob) -> list[Step]:
    """Timestep, expert and guidance of every step (as in diffusers' `WanPipeline.__call__`)."""
    boundary = None if job.boundary_ratio is None else job.boundary_ratio * solver.config.num_train_timesteps
    steps = []
    # The host compares its own copy: each look at one of an accelerator's would wait for all that is in its queue.
    compared = solver.timesteps if boundary is None else solver.timesteps.cpu()
    for timestep, known in zip(solver.timesteps, compared, strict=True):
        expert = 0 if boundary is None or known >= boundary else 1
        guidance = job.guidance_scale if expert == 0 else job.guidance_scale_2
        assert guidance is not None
        steps.append(Step(timestep, expert, guidance))
    return steps


def contents(solver: Any) -> dict[str, Any]:
    """What a solver has now; its lists are copied, for it changes them in place."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(solver).items()}


def export_solver(solver: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """What steps have changed of a solver, against its `contents` before them: its history, and what it counts."""
    return {
        name: copied(value)
        for name, value in vars(solver).items()
        if name not in before or not _same(value, before[name])
    }


def restore_solver(solver: Any, exported: Mapping[str, Any]) -> None:
    """Go on with a new solver where the other one was."""
    vars(solver).update(copied(dict(exported)))


def history_bytes(solver: Any, latents: int) -> int:
    """Of the tensors that a solver keeps between steps at most, for so many bytes of float32 latents: a prediction for
    each order, and a sample."""
    return latents * (int(getattr(solver.config, "solver_order", 0)) + 1)


def _same(one: Any, other: Any) -> bool:
    """Tensors are so where they are the same one: a look at an accelerator's values would wait for all in its queue."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    if isinstance(one, list):
        same_length = isinstance(other, list) and len(one) == len(other)
        return same_length and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one is other or bool(np.all(one == other))
