"""The toy family's model in one piece: a plain loop, which shares only the arithmetic with the cut one."""

from __future__ import annotations

import numpy as np
import torch
from toy_arithmetic import DECODER_UNITS, TEXT_LAYERS, C, block, decoder_unit, quantise, step_of, text_layer, text_of
from toy_family import ToySpec

from cineline import VideoRequest


def toy_reference(spec: ToySpec, request: VideoRequest) -> tuple[torch.Tensor, np.ndarray | None]:
    """Latents [1, F', C, 1] and frames [F', 1, 1, C]."""
    job = spec.resolve(request, 0)
    latents = torch.randn(job.num_frames, C, generator=torch.Generator().manual_seed(job.seed))
    before = torch.zeros(())
    for step in range(job.steps):

        def forward(prompt: str, latents: torch.Tensor = latents, step: int = step) -> torch.Tensor:
            hidden, text = latents + step, text_of(prompt)
            for layer in range(TEXT_LAYERS):
                text = text_layer(text, layer)
            for layer in range(spec.layers):
                hidden = block(layer, hidden, text)
            return hidden

        cond = forward(job.prompt)
        second = step >= job.seed % (job.steps + 1)  # the second expert's, where there are two
        alone = job.branches == 1 or (second and request.skip_guidance_at_one)
        uncond = cond if alone else forward(job.negative_prompt)
        prediction = uncond + job.guidance_scale * (cond - uncond)
        latents, before = step_of(latents, prediction, before), prediction
    frames = torch.cat([decode(pixel) for pixel in latents]).numpy() if job.chunks else None
    return latents.view(1, -1, C, 1), frames


def decode(pixel: torch.Tensor) -> torch.Tensor:
    for unit in range(DECODER_UNITS):
        pixel = decoder_unit(pixel, unit)
    return quantise(pixel)
