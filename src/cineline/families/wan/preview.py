"""A small picture of latents that are not decoded: each latent becomes one pixel, by a linear map.

There are two maps, of the first latent frame and of the others. They are fitted to the VAE at hand, once, when a
preview is first asked for: clips of moving shapes in random colours, one over the other ("dead leaves", whose edges and
areas are like those of photographs: Lee, Mumford and Huang 2001), go through its encoder, and least squares find the
colours again in the latents. So there are no constants, and any VAE has maps.

Legend: C latent channels, F' latent frames, H' x W' latents a frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.vae import vae_of
from cineline.families.wan_vae.halves import ENCODER, load_half, statistics

CLIPS = 24
CELLS = 8
"""Latents along a side of a clip that the maps are fitted to."""

PARTS = slice(0, 1), slice(1, None)
"""Of the latent frames."""

RIDGE = 1e-3
"""What is added to the squares of each channel, which have the variance 1, so that channels alike share."""


class Previewer:
    """A model's, on the rank that steps."""

    def __init__(self, spec: WanSpec, part: StagePart) -> None:
        self._spec, self._device = spec, part.device

    def picture(self, latents: Tensor) -> Tensor:
        """Of normalised latents [1, C, F', H', W'] the colours, uint8 [F', H', W', 3]."""
        frames = latents[0].float().movedim(0, -1)
        first, later = (
            frames[part] @ weights[:-1] + weights[-1] for part, weights in zip(PARTS, self._maps, strict=True)
        )
        return torch.cat([first, later]).mul(255).round().clamp(0, 255).to(torch.uint8)

    @cached_property
    def _maps(self) -> tuple[Tensor, Tensor]:
        """Of the first latent frame, and of the others, float32 [C + 1, 3]: of each channel its share of red, green and
        blue from 0 to 1, and what is added."""
        spec, device = self._spec, self._device
        vae, _ = load_half(vae_of(spec), ENCODER, torch.float32, device)
        mean, inverse_std = statistics(vae.config, torch.float32, device)
        known, wanted = [], []
        for clip in _clips(spec.vae_scale, 1 + spec.vae_frames):
            latents = vae.encode(clip[None].to(device) * 2 - 1).latent_dist.mode()
            known.append(((latents - mean) * inverse_std)[0].movedim(0, -1).cpu().double())
            small = avg_pool2d(clip.transpose(0, 1), spec.vae_scale)
            wanted.append(torch.stack([small[0], small[1:].mean(dim=0)]).movedim(1, -1).double())
        # A VAE has a frame of its own in the first latent frame, and four in each other one.
        first, later = (
            _fitted(torch.cat([each[part] for each in known]), torch.cat([each[part] for each in wanted]))
            for part in PARTS
        )
        return first.to(device, torch.float32), later.to(device, torch.float32)


def _fitted(latents: Tensor, colours: Tensor) -> Tensor:
    """The map [C + 1, 3] from latents [..., C] to colours [..., 3] with the least squares."""
    known, wanted = latents.flatten(0, -2), colours.flatten(0, -2)
    known = torch.cat([known, known.new_ones(len(known), 1)], dim=1)
    squares = known.T @ known + RIDGE * len(known) * torch.eye(known.shape[1], dtype=known.dtype)
    fitted: Tensor = torch.linalg.solve(squares, known.T @ wanted)
    return fitted


def _clips(scale: int, frames: int) -> Iterator[Tensor]:
    """Float32 [3, F, H, W] from 0 to 1, the same ones each time: one to three discs and squares that move."""
    generator = torch.Generator("cpu").manual_seed(0)
    side = CELLS * scale
    at = torch.arange(side) + 0.5
    for _ in range(CLIPS):
        clip = _colour(generator)[:, None, None, None].repeat(1, frames, side, side)
        for _ in range(1 + int(3 * torch.rand((), generator=generator))):
            row, column, size, down, right, is_square = torch.rand(6, generator=generator).tolist()
            colour = _colour(generator)[:, None]
            for frame in range(frames):
                rows = (at - side * (row + 0.05 * (down - 0.5) * frame)).abs()[:, None]
                columns = (at - side * (column + 0.05 * (right - 0.5) * frame)).abs()[None]
                reach = torch.maximum(rows, columns) if is_square < 0.5 else (rows.square() + columns.square()).sqrt()
                clip[:, frame, reach < side * (0.1 + 0.3 * size)] = colour
        yield clip


def _colour(generator: torch.Generator) -> Tensor:
    """Red, green and blue [3], from 0 to 1; every second one of full saturation."""
    colour = torch.rand(3, generator=generator)
    return colour.round() if torch.rand((), generator=generator) < 0.5 else colour
