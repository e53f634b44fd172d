"""The decoder of HunyuanVideo 1.5's VAE, unit by unit: what each weighs, computes and hands on (no torch).

It decodes all frames at once: a chunk is the whole clip. Legend: F' latent frames, H' x W' latents a frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cineline.core.work import Parameters, Work

Convolutions = tuple[tuple[int, int], ...]
"""Channels in and out of 3x3x3 ones."""


@dataclass(frozen=True)
class Unit:
    """A module of diffusers' decoder, or its last ones together.

    Attributes:
        name: as diffusers has it; "head" for the last ones.
        taken, given: channels of its input and of its output. convs: channels in and out of its 3x3x3 convolutions.
        others: weights of what else is in it. scale: times rows and columns that come have doubled before it.
        doubled: times the frames have. attends: within the middle.
    """

    name: str
    taken: int
    given: int
    convs: Convolutions
    others: int
    scale: int
    doubled: int
    attends: bool = False

    @property
    def parameters(self) -> Parameters:
        return Parameters(sum(27 * one * other + other for one, other in self.convs) + self.others)

    def cells(self, latent_shape: Sequence[int]) -> int:
        """Positions of what comes: each doubling of frames leaves the first one alone."""
        _, _, frames, rows, columns = latent_shape
        return ((frames - 1) * (1 << self.doubled) + 1) * rows * columns * (1 << 2 * self.scale)

    def shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Of what comes, [1, channels, frames, rows, columns]."""
        _, _, frames, rows, columns = latent_shape
        side = 1 << self.scale
        return 1, self.taken, (frames - 1) * (1 << self.doubled) + 1, rows * side, columns * side

    def flop(self, latent_shape: Sequence[int]) -> int:
        """Of the whole clip."""
        cells = self.cells(latent_shape)
        attention = 4 * cells * cells * self.taken if self.attends else 0
        return 2 * cells * sum(27 * one * other for one, other in self.convs) + attention

    def work(self, latent_shape: Sequence[int], itemsize: int) -> Work:
        """The same, with what its element-wise operations move."""
        passes = 12 * self.cells(latent_shape) * sum(one for one, _ in self.convs)
        return Work(convolution=self.flop(latent_shape), moved=passes * itemsize, calls=1)

    def workspace(self, latent_shape: Sequence[int], itemsize: int) -> int:
        """Most bytes held: the input, a convolution's padded one and its output; in the middle a mask, too."""
        cells = self.cells(latent_shape)
        mask = cells * cells if self.attends else 0
        return (cells * max(2 * one + 2 * other for one, other in self.convs) + mask) * itemsize


@dataclass(frozen=True)
class HunyuanVae:
    """The decoder."""

    units: tuple[Unit, ...]
    colours: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> HunyuanVae:
        """From a `vae/config.json`; what it leaves out is as in diffusers."""
        return cls(tuple(_units(config)), int(config.get("out_channels", 3)))

    def boundary(self, unit: int, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of what travels in front of a unit; behind the last one frames [F, H, W, 3]."""
        if unit < len(self.units):
            return self.units[unit].shape(latent_shape)
        _, _, frames, rows, columns = self.units[-1].shape(latent_shape)
        return frames, rows, columns, self.colours


def _resnet(taken: int, given: int) -> tuple[Convolutions, int]:
    """Its convolutions, and weights of its norms and its shortcut."""
    shortcut = taken * given + given if taken != given else 0
    return ((taken, given), (given, given)), taken + given + shortcut


def _units(config: Mapping[str, Any]) -> Iterator[Unit]:
    """As `HunyuanVideo15Decoder3D.__init__` builds them."""
    widths = list(reversed(config.get("block_out_channels", (128, 256, 512, 1024, 1024))))
    latents, here = int(config.get("latent_channels", 32)), widths[0]
    scales = int(math.log2(config.get("spatial_compression_ratio", 16)))
    doubles = int(math.log2(config.get("temporal_compression_ratio", 4)))
    matches = config.get("upsample_match_channel", True)
    yield Unit("conv_in", latents, here, ((latents, here),), 0, 0, 0)
    convs, others = _resnet(here, here)
    attention = 4 * (here * here + here) + here
    yield Unit("mid_block", here, here, convs * 2, 2 * others + attention, 0, 0, attends=True)
    for number, width in enumerate(widths):
        own: Convolutions = ()
        taken, other = here, 0
        for _ in range(int(config.get("layers_per_block", 2)) + 1):
            convs, others = _resnet(here, width)
            own, other, here = (*own, *convs), other + others, width
        if number < scales:
            here = widths[number + 1] if matches else width
            own = (*own, (width, here * (8 if number < doubles else 4)))
        yield Unit(f"up_blocks.{number}", taken, here, own, other, min(number, scales), min(number, doubles))
    colours = int(config.get("out_channels", 3))
    yield Unit("head", here, colours, ((here, colours),), here, scales, doubles)
