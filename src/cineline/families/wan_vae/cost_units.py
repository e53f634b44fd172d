"""The parts that Wan's VAEs are made of, and what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cineline.core.work import Parameters, Work

CACHE_FRAMES = 2
"""Of its input, that a causal convolution keeps for the next chunk (diffusers' `CACHE_T`)."""


class Map(NamedTuple):
    """A feature map of one chunk.

    Attributes:
        channels: of a cell. frames: of a chunk that is not the first, which has one. side: cells a side of one latent.
    """

    channels: int
    frames: int
    side: int

    def wide(self, channels: int) -> Map:
        """The same with other channels."""
        return self._replace(channels=channels)

    def shape(self, latent_shape: Sequence[int], chunk: int) -> tuple[int, ...]:
        """[1, channels, frames, rows, columns] for latents [1, C, F', H', W']."""
        return 1, self.channels, self.frames if chunk else 1, self.side * latent_shape[3], self.side * latent_shape[4]

    def cells(self, latents: int, first: bool) -> int:
        """Numbers in it, for H' x W' = `latents`."""
        return self.frame(latents) * (1 if first else self.frames)

    def frame(self, latents: int) -> int:
        """Numbers in one of its frames."""
        return self.channels * self.side**2 * latents


class Conv(NamedTuple):
    """A convolution: its input and output, the kernel's volume; `cached` where it looks back in time.

    `later` for one that the first chunk leaves out.
    """

    taken: Map
    given: Map
    volume: int
    cached: bool = False
    later: bool = False

    @property
    def parameters(self) -> int:
        return self.given.channels * (self.taken.channels * self.volume + 1)

    def flop(self, latents: int, first: bool) -> int:
        if first and self.later:
            return 0
        return 2 * self.volume * self.taken.channels * self.given.cells(latents, first)


@dataclass(frozen=True)
class Unit:
    """One unit of a half.

    Attributes:
        name: as in the checkpoint, or "head" for the last norm, activation and convolution.
        taken, given: maps before and after it.
        convs: its convolutions.
        norms: channels of its norms' weights, together.
        attends: whether it is the attention over all cells of a frame.
        upsamples: whether it holds its enlarged input before it convolves it.
        shortcut: the map that travels beside, in a residual block.
    """

    name: str
    taken: Map
    given: Map
    convs: tuple[Conv, ...]
    norms: int = 0
    attends: bool = False
    upsamples: bool = False
    shortcut: Map | None = None

    @classmethod
    def conv(cls, name: str, taken: Map, channels: int, normed: bool = False) -> Unit:
        """A causal 3x3x3 convolution, with norm and activation before it if `normed`."""
        given = taken.wide(channels)
        return cls(name, taken, given, (Conv(taken, given, 27, cached=True),), taken.channels if normed else 0)

    @classmethod
    def resnet(cls, name: str, taken: Map, channels: int, shortcut: Map | None) -> Unit:
        """Two of them, each with norm and activation, and a 1x1x1 one beside where the channels change."""
        given = taken.wide(channels)
        convs = [Conv(taken, given, 27, cached=True), Conv(given, given, 27, cached=True)]
        if taken.channels != channels:
            # It is cached by nobody, though diffusers counts a place for it.
            convs.append(Conv(taken, given, 1))
        return cls(name, taken, given, tuple(convs), taken.channels + channels, shortcut=shortcut)

    @classmethod
    def attention(cls, name: str, taken: Map) -> Unit:
        """Single head, frame by frame."""
        qkv = Conv(taken, taken.wide(3 * taken.channels), 1)
        return cls(name, taken, taken, (qkv, Conv(taken, taken, 1)), taken.channels, attends=True)

    @classmethod
    def upsampler(cls, name: str, taken: Map, channels: int, doubles: bool, shortcut: Map | None) -> Unit:
        """Twice the rows and columns, and (`doubles`) twice the frames, except of the first chunk."""
        given = Map(channels, taken.frames * (2 if doubles else 1), taken.side * 2)
        convs = [Conv(taken._replace(frames=given.frames, side=given.side), given, 9)]
        if doubles:
            convs.append(Conv(taken, taken.wide(2 * taken.channels), 3, cached=True, later=True))
        return cls(name, taken, given, tuple(convs), upsamples=True, shortcut=shortcut)

    @classmethod
    def downsampler(cls, name: str, taken: Map, halves: bool) -> Unit:
        """Half the rows and columns, and (`halves`) half the frames, except of the first chunk."""
        flat = taken._replace(side=taken.side // 2)
        given = flat._replace(frames=taken.frames // (2 if halves else 1))
        convs = [Conv(taken, flat, 9)]
        if halves:
            convs.append(Conv(flat, given, 3, cached=True, later=True))
        return cls(name, taken, given, tuple(convs))

    @property
    def parameters(self) -> Parameters:
        return Parameters(sum(conv.parameters for conv in self.convs) + self.norms)

    def flop(self, latents: int, first: bool = False) -> int:
        """Of a chunk."""
        attention = 4 * latents**2 * self.taken.channels if self.attends else 0
        return sum(conv.flop(latents, first) for conv in self.convs) + attention

    def work(self, latents: int, first: bool, itemsize: int) -> Work:
        """Of a chunk, H' x W' = `latents`."""
        attention = 4 * latents**2 * self.taken.channels if self.attends else 0
        passes = sum((18 if conv.cached else 4) * conv.taken.cells(latents, first) for conv in self.convs)
        return Work(
            convolution=self.flop(latents, first) - attention,
            attention=attention,
            moved=(passes + 3 * self.given.cells(latents, first)) * itemsize,
            calls=1,
        )

    def cache_bytes(self, latents: int, itemsize: int) -> int:
        """Kept between chunks, from the second one on."""
        return sum(CACHE_FRAMES * conv.taken.frame(latents) * itemsize for conv in self.convs if conv.cached)

    def workspace(self, latents: int, first: bool, itemsize: int) -> int:
        """Most bytes held while it runs: input, output, the padded input of a convolution, the shortcut."""
        steps: Sequence[int] = [self._held(conv, latents, first) for conv in self.convs]
        beside = 0 if self.shortcut is None else self.shortcut.cells(latents, first)
        return (max(steps) + beside) * itemsize

    def _held(self, conv: Conv, latents: int, first: bool) -> int:
        """Numbers held around one of its convolutions.

        A causal one: the unit's input, its shortcut's projection, the activation, the new cache, what the old cache
        and the activation make together, and that padded; then the output instead of the former.
        """
        unit_input = self.taken.cells(latents, first)
        own, out = conv.taken.cells(latents, first), conv.given.cells(latents, first)
        if not conv.cached:
            return unit_input + own + out if self.upsamples else unit_input + out
        longer = own + CACHE_FRAMES * conv.taken.frame(latents)
        projected = self.given.cells(latents, first) if self.taken.channels != self.given.channels else 0
        beside = unit_input + (projected if self.norms else 0) + CACHE_FRAMES * conv.taken.frame(latents)
        activation = own if self.norms else 0
        return beside + activation + longer + max(longer, out)
