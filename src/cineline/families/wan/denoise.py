"""Denoising as pure functions of a request: timesteps, expert choice, the noise that a solver adds.

The solver is diffusers' own scheduler object, one a request: a multistep solver keeps a history.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cineline.errors import CheckpointError, shown
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

    `flow_shift` replaces the parameter of that meaning: `shift` of Euler and LCM, `flow_shift` of the others.

    Args:
        class_name, config: as `schedules.solver_of` has them.

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
    levels = {} if job.sigmas is None else {"sigmas": np.array(job.sigmas)}
    solver.set_timesteps(job.steps, device=device, **levels)
    if len(solver.timesteps) != job.steps:
        raise CheckpointError(
            f"{class_name} makes {len(solver.timesteps)} timesteps of {job.steps} steps: "
            "use a solver with one forward a step, such as UniPCMultistepScheduler."
        )
    solver.set_begin_index(0)
    return solver


def make_steps(solver: Any, job: WanJob) -> list[Step]:
    """Timestep, expert and guidance of every step (as in diffusers' `WanPipeline.__call__`, which knows no switch by
    number)."""
    boundary = None if job.boundary_ratio is None else job.boundary_ratio * solver.config.num_train_timesteps
    steps = []
    # The host compares its own copy: each look at one of an accelerator's would wait for all that is in its queue.
    compared = solver.timesteps if boundary is None else solver.timesteps.cpu()
    for number, (timestep, known) in enumerate(zip(solver.timesteps, compared, strict=True)):
        expert = 0 if boundary is None or known >= boundary else 1
        if job.switch_step is not None:
            expert = int(number >= job.switch_step)
        guidance = job.guidance_scale if expert == 0 else job.guidance_scale_2
        assert guidance is not None
        steps.append(Step(timestep, expert, guidance))
    return steps


def noise_generator(seed: int, step: int) -> torch.Generator:
    """Of what a solver adds at a step: on the CPU, seeded with the first eight bytes, the highest first, of the SHA-256
    of the text "seed:step" in decimal digits. So no other step, request or restart changes it."""
    digest = hashlib.sha256(f"{seed}:{step}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big"))


def take_step(
    solver: Any, prediction: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The latents [1, C, F', H', W'] of the next step, float32.

    Euler and LCM give them in the prediction's dtype, and make float32 of them again before anything else.

    Args:
        prediction: of the model, with guidance, in its dtype. latents: of this step, float32.
        generator: of the noise, for solvers that add some.
    """
    noise = {"generator": generator} if "generator" in inspect.signature(solver.step).parameters else {}
    made: torch.Tensor = solver.step(prediction, timestep, latents, return_dict=False, **noise)[0]
    return made.float()
