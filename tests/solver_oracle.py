"""diffusers' pipelines with another solver, other noise levels, named noise or a switch by number: what `WanPipeline`
has no arguments for, put on it from outside, without any of Cineline's own code."""

from __future__ import annotations

import hashlib
import inspect
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import oracle
import torch

from cineline import VideoRequest
from cineline.core.request import drawn

CLASSES = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "FlowMatchLCMScheduler",
}


def generator_of(seed: int, step: int) -> torch.Generator:
    """As docs/schedules.md has it."""
    return torch.Generator("cpu").manual_seed(int(hashlib.sha256(b"%d:%d" % (seed, step)).hexdigest()[:16], 16))


def solver_of(theirs: Any, request: VideoRequest) -> Any:
    """A scheduler of the request's class, from a checkpoint's own."""
    cls = getattr(diffusers, CLASSES[request.solver]) if request.solver else type(theirs)
    shift = request.flow_shift or theirs.config.get("flow_shift", theirs.config.get("shift"))
    own = {"shift": shift, "flow_shift": shift, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    taken = {name: own[name] for name in own if name in inspect.signature(cls).parameters}
    return cls.from_config(theirs.config, **taken)


def bound(solver: Any, request: VideoRequest) -> Any:
    """The solver, whose `set_timesteps` takes the request's sigmas and whose `step` a generator for each step."""
    set_timesteps, step = solver.set_timesteps, solver.step
    count = 0

    def with_sigmas(number: int, device: Any = None) -> None:
        set_timesteps(number, device=device, sigmas=np.array(request.sigmas))

    def with_noise(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return step(*arguments, generator=generator_of(drawn(request.seed), count - 1), **named)

    if request.sigmas is not None:
        solver.set_timesteps = with_sigmas
    if "generator" in inspect.signature(step).parameters:
        solver.step = with_noise
    return solver


def boundary_of(solver: Any, switch: int) -> float:
    """A boundary ratio between the steps before that number and those from it on; the solver's timesteps are set."""
    times = [2000.0, *(float(each) for each in solver.timesteps), -2000.0]
    assert times[switch] > times[switch + 1], "no boundary is between equal timesteps"
    return (times[switch] + times[switch + 1]) / 2 / float(solver.config.num_train_timesteps)


@contextmanager
def second_forward_skipped(model: Any, skip: bool) -> Iterator[None]:
    """Of the model's two forwards a step, the second one is the first one's result: guidance of 1 then changes nothing,
    uncond + 1 (cond - uncond) being cond."""
    if not skip:
        yield
        return
    made: list[Any] = []
    forward = model.forward

    def once(*arguments: Any, **named: Any) -> Any:
        if made:
            return made.pop()
        made.append(forward(*arguments, **named))
        return made[0]

    model.forward = once
    try:
        yield
    finally:
        del model.forward
    assert not made, "an odd number of forwards"


_made: dict[bytes, tuple[torch.Tensor, np.ndarray]] = {}


def run(folder: Path, dtype: str, request: VideoRequest, skip: bool = False) -> tuple[torch.Tensor, np.ndarray]:
    """As `_run`, which makes it once."""
    key = pickle.dumps((folder, dtype, request.model_dump(), skip))
    if key not in _made:
        _made[key] = _run(folder, dtype, request, skip)
    return _made[key]


def _run(folder: Path, dtype: str, request: VideoRequest, skip: bool = False) -> tuple[torch.Tensor, np.ndarray]:
    """Latents float32 [C, F', H', W'] and frames uint8 [F, H, W, 3]; `skip` the second expert's second forwards."""
    plain = oracle._pipeline(folder, dtype, request.image is not None, "float32")
    solver = bound(solver_of(plain.scheduler, request), request)
    steps = request.num_inference_steps or len(request.sigmas or ())
    boundary = plain.config.boundary_ratio if request.boundary_ratio is None else request.boundary_ratio
    if request.switch_step is not None:
        solver.set_timesteps(steps)
        boundary = boundary_of(solver, request.switch_step)
    components = {**plain.components, "scheduler": solver}
    pipeline = type(plain)(**components, boundary_ratio=boundary, expand_timesteps=plain.config.expand_timesteps)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {name: getattr(request, name) for name in oracle.FIELDS if getattr(request, name) is not None}
    with second_forward_skipped(plain.transformer_2, skip):
        latents = pipeline(
            generator=torch.Generator("cpu").manual_seed(drawn(request.seed)),
            output_type="latent",
            **{**arguments, "num_inference_steps": steps},
        ).frames
    return latents[0].float(), oracle.frames_of(plain.vae, latents)
