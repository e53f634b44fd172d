"""diffusers' own pipelines, run on the same checkpoint: what every test of bits compares with."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline
from diffusers.video_processor import VideoProcessor
from PIL import Image
from transformers import CLIPVisionModel

from cineline import Video, VideoRequest
from cineline.core.request import drawn
from cineline.families.wan.random_checkpoint import RandomConfig

Checkpoint = Callable[[RandomConfig], Path]
"""The fixture of that name: where a random checkpoint of a config is."""

FIELDS = (
    *("prompt", "negative_prompt", "image", "last_image", "height", "width", "num_frames"),
    *("num_inference_steps", "guidance_scale", "guidance_scale_2"),
)


@cache
def _pipeline(folder: Path, dtype: str, with_image: bool, vae_dtype: str) -> Any:
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=getattr(torch, vae_dtype))
    cls = WanImageToVideoPipeline if with_image else WanPipeline
    parts = {"vae": vae}
    if (folder / "image_encoder").exists():  # in the VAE's dtype, as diffusers documents it
        eyes = CLIPVisionModel.from_pretrained(folder / "image_encoder", dtype=getattr(torch, vae_dtype))
        parts["image_encoder"] = eyes
    pipeline = cls.from_pretrained(folder, dtype=getattr(torch, dtype), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def frames_of(vae: AutoencoderKLWan, latents: torch.Tensor) -> np.ndarray:
    """As the end of `WanPipeline.__call__`: uint8 [F, H, W, 3] of latents [1, C, F', H', W']."""
    latents = latents.to(vae.dtype)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(vae.dtype)
    inverse_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(vae.dtype)
    pixels = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
    return stacked(VideoProcessor().postprocess_video(pixels, output_type="pil")[0])


def stacked(pictures: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in pictures])


def by_pipeline(folder: Path, dtype: str, request: VideoRequest, vae_dtype: str, output_type: str) -> Any:
    """What a pipeline gives: latents [1, C, F', H', W'] ("latent"), or a list of pictures for each video ("pil")."""
    pipeline = _pipeline(folder, dtype, request.image is not None, vae_dtype)
    arguments = {name: getattr(request, name) for name in FIELDS if getattr(request, name) is not None}
    generator = torch.Generator("cpu").manual_seed(drawn(request.seed))
    return pipeline(generator=generator, output_type=output_type, **arguments).frames


class Oracle:
    """Latents and frames of a request, from diffusers; it keeps what it has made."""

    def __init__(self) -> None:
        self._made: dict[bytes, tuple[torch.Tensor, np.ndarray]] = {}

    def run(
        self, folder: Path, dtype: str, request: VideoRequest, vae_dtype: str = "float32"
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Latents float32 [C, F', H', W'] and frames uint8 [F, H, W, 3]."""
        key = pickle.dumps((folder, dtype, vae_dtype, [getattr(request, name) for name in ("seed", *FIELDS)]))
        if key not in self._made:
            latents = by_pipeline(folder, dtype, request, vae_dtype, "latent")
            vae = _pipeline(folder, dtype, request.image is not None, vae_dtype).vae
            self._made[key] = latents[0].float(), frames_of(vae, latents)
        return self._made[key]


def assert_equal(video: Video, expected: tuple[torch.Tensor, np.ndarray]) -> None:
    """Bit for bit, latents and frames."""
    latents, frames = expected
    assert video.latents.dtype == torch.float32
    difference = (video.latents - latents).abs().max() if video.latents.shape == latents.shape else "shape"
    assert torch.equal(video.latents, latents), f"latents differ by {difference}"
    assert video.frames is not None
    assert video.frames.dtype == np.uint8
    assert np.array_equal(video.frames, frames)
