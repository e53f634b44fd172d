"""The toy family's model in one piece: a plain loop, which shares only the arithmetic with the cut one."""

from __future__ import annotations

import numpy as np
import torch
from toy_family import C, ToySpec, block, step_of, text_of

from cineline import VideoRequest


def toy_reference(spec: ToySpec, request: VideoRequest) -> tuple[torch.Tensor, np.ndarray | None]:
    """Latents [1, F', C, 1] and frames [F', 1, 1, C]."""
    job = spec.resolve(request, 0)
    latents = torch.randn(job.num_frames, C, generator=torch.Generator().manual_seed(job.seed))
    before = torch.zeros(())
    for step in range(job.steps):

        def forward(prompt: str, latents: torch.Tensor = latents, step: int = step) -> torch.Tensor:
            hidden = latents + step
            for layer in range(spec.layers):
                hidden = block(layer, hidden, text_of(prompt))
            return hidden

        cond = forward(job.prompt)
        uncond = forward(job.negative_prompt) if job.branches == 2 else cond
        prediction = uncond + job.guidance_scale * (cond - uncond)
        latents, before = step_of(latents, prediction, before), prediction
    frames = (latents.view(-1, 1, 1, C) * 40 + 128).clamp(0, 255).byte().numpy() if job.chunks else None
    return latents.view(1, -1, C, 1), frames
