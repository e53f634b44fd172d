"""Clips to latents, once, for all of the transformer's training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from training.clips import draw_clip, render
from training.loop import Report, device, write_whole
from training.scenes import Scene
from training.transformer import Latents

AT_ONCE = 8


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, side: int, frames: int, clips: int, file: Path) -> Latents:
    """Draw and encode that many clips, or read them from `file`."""
    if not file.exists():
        mean, deviation = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        progress = Report("latents", 0, clips)
        values: list[Tensor] = []
        words: list[tuple[str, ...]] = []
        for start in range(0, clips, AT_ONCE):
            drawn = [draw_clip(np.random.default_rng((5, number)), frames) for number in range(start, start + AT_ONCE)]
            pixels = torch.from_numpy(np.stack([render(clip, side) for clip in drawn])).to(device())
            latents = vae.encode(pixels).latent_dist.mode().cpu()
            values.append(((latents - mean) / deviation).half())
            words += [tuple(vars(clip.scene).values()) for clip in drawn]
            progress.add(min(clips, start + AT_ONCE))
        write_whole(file, {"values": torch.cat(values)[:clips], "words": words[:clips]})
    stored = torch.load(file)
    return Latents(stored["values"], [Scene(*words) for words in stored["words"]])
