"""Costs of Wan's VAEs (diffusers' `AutoencoderKLWan`), unit by unit.

Both halves work chunk by chunk: the first holds one frame, each other one latent frame's worth. A causal
convolution keeps the last two frames of its input for the next chunk.

Legend: H' x W' latents a frame. A map's cell is one position of it; `side` cells a side cover one latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cineline.core.work import Parameters, Work
from cineline.families.wan_vae.cost_units import Map, Unit

DEFAULTS: Mapping[str, Any] = {
    "base_dim": 96,
    "decoder_base_dim": None,
    "z_dim": 16,
    "dim_mult": (1, 2, 4, 4),
    "num_res_blocks": 2,
    "temperal_downsample": (False, True, True),
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
}
"""diffusers' own, of what a `vae/config.json` leaves out."""


@dataclass(frozen=True)
class VaeCosts:
    """Both halves.

    Attributes:
        encoder, decoder: their units, in order.
        latents: channels. pixels: channels of the decoder's output. patch: pixels a side of one of its cells.
        frames: of a chunk that is not the first.
    """

    encoder: tuple[Unit, ...]
    decoder: tuple[Unit, ...]
    latents: int
    pixels: int
    patch: int
    frames: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VaeCosts:
        """From a `vae/config.json`."""
        full = {**DEFAULTS, **config}
        decoder = tuple(_decoder(full))
        return cls(
            encoder=tuple(_encoder(full)),
            decoder=decoder,
            latents=full["z_dim"],
            pixels=full["out_channels"],
            patch=full["patch_size"] or 1,
            frames=decoder[-1].given.frames,
        )

    @property
    def names(self) -> list[str]:
        """Of the decoder's units."""
        return [unit.name for unit in self.decoder]

    @property
    def encoder_parameters(self) -> Parameters:
        """With `quant_conv`."""
        return sum((unit.parameters for unit in self.encoder), _pointwise(2 * self.latents))

    @property
    def before_decoder(self) -> Parameters:
        """`post_quant_conv`, where the latents come in."""
        return _pointwise(self.latents)

    @property
    def whole(self) -> Parameters:
        return sum((unit.parameters for unit in self.decoder), self.encoder_parameters + self.before_decoder)

    def encode_work(self, cells: int, chunks: int, itemsize: int) -> Work:
        """An image followed by grey: so many chunks of H' x W' = `cells` latents."""
        first = sum((unit.work(cells, True, itemsize) for unit in self.encoder), Work())
        other = sum((unit.work(cells, False, itemsize) for unit in self.encoder), Work())
        return first + other * (chunks - 1)

    def encode_workspace(self, cells: int, chunks: int, itemsize: int) -> int:
        """Most bytes that encoding holds: the clip twice, the feature caches, the largest unit."""
        first = chunks == 1
        frames = 1 + (chunks - 1) * self.frames
        clip = 2 * frames * self.encoder[0].taken.channels * self.encoder[0].taken.side ** 2 * cells * itemsize
        caches = 0 if first else sum(unit.cache_bytes(cells, itemsize) for unit in self.encoder)
        return clip + caches + max(unit.workspace(cells, first, itemsize) for unit in self.encoder)

    def boundary_shapes(self, unit: int, latent_shape: Sequence[int], chunk: int) -> tuple[tuple[int, ...], ...]:
        """What travels in front of a unit, or behind the last one, for latents [1, C, F', H', W'].

        The feature map, and within a residual block its shortcut; behind the last unit frames, [F, H, W, 3].
        """
        if unit < len(self.decoder):
            maps = [self.decoder[unit].taken, self.decoder[unit].shortcut]
            return tuple(kept.shape(latent_shape, chunk) for kept in maps if kept is not None)
        _, channels, frames, height, width = self.decoder[-1].given.shape(latent_shape, chunk)
        return ((frames, height * self.patch, width * self.patch, channels // self.patch**2),)

    def boundary_bytes(self, unit: int, cells: int, first: bool, itemsize: int) -> int:
        """What travels in front of a unit (in a residual block with its shortcut); behind the last one the frames."""
        if unit < len(self.decoder):
            maps = [self.decoder[unit].taken, self.decoder[unit].shortcut]
            return sum(kept.cells(cells, first) * itemsize for kept in maps if kept is not None)
        given = self.decoder[-1].given
        return given.cells(cells, first)  # one byte a colour


def _pointwise(channels: int) -> Parameters:
    return Parameters(channels * channels + channels)


def _decoder(config: Mapping[str, Any]) -> Iterator[Unit]:
    """As `WanDecoder3d.__init__` builds them."""
    dim = config["decoder_base_dim"] or config["base_dim"]
    widths = [dim * times for times in (config["dim_mult"][-1], *reversed(config["dim_mult"]))]
    here = Map(widths[0], 1, 1)
    yield Unit.conv("conv_in", Map(config["z_dim"], 1, 1), widths[0])
    yield from _middle(here)
    longer = [*reversed(config["temperal_downsample"]), None]
    for block, (width, doubles) in enumerate(zip(widths[1:], longer, strict=True)):
        name, start = f"up_blocks.{block}", here
        kept = start if config["is_residual"] and doubles is not None else None
        for number in range(config["num_res_blocks"] + 1):
            yield Unit.resnet(f"{name}.resnets.{number}", here, width, kept if number else None)
            here = here.wide(width)
        if doubles is None:
            continue
        outer = width if config["is_residual"] else width // 2
        end = f"{name}.upsampler" if config["is_residual"] else f"{name}.upsamplers.0"
        yield Unit.upsampler(end, here, outer, doubles, kept)
        here = Map(outer, here.frames * (2 if doubles else 1), here.side * 2)
    yield Unit.conv("head", here, config["out_channels"], normed=True)


def _encoder(config: Mapping[str, Any]) -> Iterator[Unit]:
    """As `WanEncoder3d.__init__` builds them."""
    widths = [config["base_dim"] * times for times in (1, *config["dim_mult"])]
    shorter = [*config["temperal_downsample"], None]
    here = Map(config["in_channels"], 2 ** sum(config["temperal_downsample"]), 2 ** len(config["temperal_downsample"]))
    yield Unit.conv("conv_in", here, widths[0])
    here = here.wide(widths[0])
    for block, (width, halves) in enumerate(zip(widths[1:], shorter, strict=True)):
        for number in range(config["num_res_blocks"]):
            yield Unit.resnet(f"down_blocks.{block}.resnets.{number}", here, width, None)
            here = here.wide(width)
        if halves is None:
            continue
        yield Unit.downsampler(f"down_blocks.{block}.downsampler", here, halves)
        here = Map(width, here.frames // (2 if halves else 1), here.side // 2)
    yield from _middle(here)
    yield Unit.conv("head", here, 2 * config["z_dim"], normed=True)


def _middle(here: Map) -> Iterator[Unit]:
    yield Unit.resnet("mid_block.resnets.0", here, here.channels, None)
    yield Unit.attention("mid_block.attentions.0", here)
    yield Unit.resnet("mid_block.resnets.1", here, here.channels, None)
