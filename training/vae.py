"""The VAE: trained on windows of clips, small ones first, through the chunked path that inference takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from training.clips import draw_clip, render_windows
from training.loop import Schedule, device, fit

L1_WEIGHT = 0.5
KL_WEIGHT = 3e-5
FIRST_LOG_VARIANCE = -5.0
"""At the start, so that the posterior's noise does not drown the signal."""

ANY_COLOUR = 0.2
"""Share of clips in colours that no word stands for: a user's image may have any."""


@dataclass(frozen=True)
class Windows:
    """A kind of batch: how many clips, of how many frames, and the window's side in pixels."""

    clips: int
    frames: int
    size: int


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        until: share of the steps after which it ends.
        windows: the kinds of batch, one drawn each step.
    """

    until: float
    windows: Sequence[Windows]


def train_vae(
    config: dict[str, object], side: int, phases: Sequence[Phase], schedule: Schedule, checkpoint: Path
) -> AutoencoderKLWan:
    """Train a VAE of this config for clips of `side` pixels."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**config).to(device())
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.z_dim :] = FIRST_LOG_VARIANCE

    def loss(step: int) -> Tensor:
        random = np.random.default_rng((1, step))
        windows = next(phase.windows for phase in phases if step < phase.until * schedule.steps)
        kind = windows[int(random.integers(len(windows)))]
        clips = [draw_clip(random, kind.frames, random.random() < ANY_COLOUR) for _ in range(kind.clips)]
        pixels = render_windows(clips, side, kind.size, random).to(device())
        generator = torch.Generator().manual_seed(step)
        posterior: DiagonalGaussianDistribution = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device())
        decoded = decode(vae, posterior.mean + posterior.std * noise)
        kl = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        error = decoded - pixels
        total: Tensor = (error**2).mean() + L1_WEIGHT * error.abs().mean() + KL_WEIGHT * kl
        return total

    vae.load_state_dict(fit(vae, schedule, loss, checkpoint, _is_matrix))
    return vae.requires_grad_(False)


def _is_matrix(name: str) -> bool:
    return name.endswith("weight")


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """As `AutoencoderKLWan.decode`, but not clamped, so that every pixel has a gradient."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    chunks = []
    for number in range(hidden.shape[2]):
        vae._conv_idx = [0]
        chunk = hidden[:, :, number : number + 1]
        chunks.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=number == 0))
    vae.clear_cache()
    pixels = torch.cat(chunks, 2)
    return unpatchify(pixels, vae.config.patch_size) if vae.config.patch_size else pixels


@torch.no_grad()
def quality(vae: AutoencoderKLWan, side: int, frames: int, clips: int = 16) -> tuple[float, float]:
    """PSNR in dB of the round trip of clips that were not trained on: first frames, all frames."""
    random = np.random.default_rng(3)
    pixels = render_windows([draw_clip(random, frames) for _ in range(clips)], side, side, random).to(device())
    error = ((vae.decode(vae.encode(pixels).latent_dist.mode()).sample - pixels) / 2) ** 2
    first, every = float(error[:, :, 0].mean()), float(error.mean())
    return -10 * float(np.log10(first)), -10 * float(np.log10(every))


@torch.no_grad()
def statistics(vae: AutoencoderKLWan, side: int, frames: int, clips: int = 64) -> tuple[list[float], list[float]]:
    """Mean and deviation of each latent channel over clips, for the VAE's config."""
    random = np.random.default_rng(4)
    pixels = render_windows([draw_clip(random, frames) for _ in range(clips)], side, side, random).to(device())
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in torch.split(pixels, 8)])
    return latents.mean((0, 2, 3, 4)).tolist(), latents.std((0, 2, 3, 4)).tolist()
