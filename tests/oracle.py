"""diffusers' own pipelines, run on the same checkpoint: what every test of bits compares with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline

from cineline import Video, VideoRequest
from cineline.families.wan.random_checkpoint import RandomConfig

Checkpoint = Callable[[RandomConfig], Path]
"""The fixture of that name: where a random checkpoint of a config is."""

FIELDS = (
    *("negative_prompt", "image", "height", "width", "num_frames"),
    *("num_inference_steps", "guidance_scale", "guidance_scale_2"),
)


@cache
def _pipeline(folder: Path, dtype: str, with_image: bool, vae_dtype: str) -> Any:
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=getattr(torch, vae_dtype))
    cls = WanImageToVideoPipeline if with_image else WanPipeline
    pipeline = cls.from_pretrained(folder, vae=vae, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Oracle:
    """Latents and frames of a request, from diffusers."""

    def run(
        self, folder: Path, dtype: str, request: VideoRequest, vae_dtype: str = "float32"
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Latents float32 [C, F', H', W'] and frames uint8 [F, H, W, 3].

        The pipeline runs twice, to its latents and to its pictures.
        """
        pipeline = _pipeline(folder, dtype, request.image is not None, vae_dtype)
        arguments = {name: getattr(request, name) for name in FIELDS if getattr(request, name) is not None}
        generator = torch.Generator("cpu").manual_seed(request.seed)
        latents = pipeline(prompt=request.prompt, generator=generator, output_type="latent", **arguments).frames
        generator = torch.Generator("cpu").manual_seed(request.seed)
        pictures = pipeline(prompt=request.prompt, generator=generator, output_type="pil", **arguments).frames[0]
        return latents[0].float(), np.stack([np.asarray(picture) for picture in pictures])


def assert_equal(video: Video, expected: tuple[torch.Tensor, np.ndarray]) -> None:
    """Bit for bit, latents and frames."""
    latents, frames = expected
    assert video.latents.dtype == torch.float32
    difference = (video.latents - latents).abs().max() if video.latents.shape == latents.shape else "shape"
    assert torch.equal(video.latents, latents), f"latents differ by {difference}"
    assert video.frames is not None
    assert video.frames.dtype == np.uint8
    assert np.array_equal(video.frames, frames)
