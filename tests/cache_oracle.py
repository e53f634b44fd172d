"""diffusers' pipelines with diffusers' own MagCache on their transformers, without any of Cineline's own code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import solver_oracle
import torch
from diffusers import MagCacheConfig

from cineline import VideoRequest


def experts_of(pipeline: Any, request: VideoRequest) -> list[int]:
    """The expert of each step."""
    steps = request.num_inference_steps or len(request.sigmas or ())
    if request.switch_step is not None:
        return [int(step >= request.switch_step) for step in range(steps)]
    boundary = pipeline.config.boundary_ratio if request.boundary_ratio is None else request.boundary_ratio
    solver = solver_oracle.bound(solver_oracle.solver_of(pipeline.scheduler, request), request)
    solver.set_timesteps(steps)
    limit = -1.0 if boundary is None else boundary * solver.config.num_train_timesteps
    return [int(float(time) < limit) for time in solver.timesteps]


@contextmanager
def mag_cached(
    pipeline: Any, experts: Sequence[int], ratios: Sequence[Sequence[float]], **settings: Any
) -> Iterator[list[int]]:
    """The pipeline's transformers with MagCache, each with its own steps; gives the computed forwards of each one."""
    models = [pipeline.transformer, pipeline.transformer_2][: 1 + max(experts)]
    computed = [0 for _ in models]
    hooks = []
    for number, model in enumerate(models):
        if number not in experts:
            continue
        own: dict[str, Any] = {} if settings.get("calibrate") else {"mag_ratios": list(ratios[number])}
        model.enable_cache(MagCacheConfig(num_inference_steps=experts.count(number), **own, **settings))

        def count(*_: Any, number: int = number) -> None:
            computed[number] += 1

        hooks.append(model.blocks[0].attn1.register_forward_hook(count))
    try:
        yield computed
    finally:
        for hook in hooks:
            hook.remove()
        for number in set(experts):
            models[number].disable_cache()


def run(
    folder: Path, dtype: str, request: VideoRequest, ratios: Sequence[Sequence[float]], threshold: float
) -> tuple[tuple[torch.Tensor, np.ndarray], list[int]]:
    """Latents float32 [C, F', H', W'] and frames uint8 [F, H, W, 3]; of each transformer, forwards that it computed."""
    pipeline = oracle._pipeline(folder, dtype, request.image is not None, "float32")
    with mag_cached(pipeline, experts_of(pipeline, request), ratios, threshold=threshold) as computed:
        made = solver_oracle._run(folder, dtype, request)
    return made, computed
