"""Costs of Wan 2.1's image encoder (transformers' `CLIPVisionModel`, all but its last layer)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cineline.core.work import Parameters, Work


@dataclass(frozen=True)
class ClipCosts:
    """The encoder, which is on the head.

    Attributes:
        layers: that are run. width, ffn: of a layer. rows: of an image. patch: numbers of pixels that make one.
        images: that it sees; 0 of a model that has none.
    """

    layers: int = 0
    width: int = 0
    ffn: int = 0
    rows: int = 0
    patch: int = 0
    images: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, rows: int, images: int) -> ClipCosts:
        """From an `image_encoder/config.json` with nothing left out; none of a model without one."""
        if config is None:
            return cls()
        return cls(
            layers=int(config["num_hidden_layers"]) - 1,
            width=int(config["hidden_size"]),
            ffn=int(config["intermediate_size"]),
            rows=rows,
            patch=int(config["num_channels"]) * int(config["patch_size"]) ** 2,
            images=images,
        )

    @property
    def parameters(self) -> Parameters:
        """Of what is kept: the embeddings, the norm before the layers, and those."""
        d, f = self.width, self.ffn
        layer = 4 * (d * d + d) + d * f + f + f * d + d + 4 * d
        return Parameters(self.layers * layer + self.patch * d + d + self.rows * d + 2 * d)

    def work(self, itemsize: int) -> Work:
        """All images through all layers."""
        rows = self.images * self.rows
        linear = self.layers * rows * (8 * self.width**2 + 4 * self.width * self.ffn)
        attention = self.layers * 4 * rows * self.rows * self.width
        patches = 2 * (rows - self.images) * self.patch * self.width
        moved = self.layers * rows * itemsize * (16 * self.width + 4 * self.ffn)
        return Work(linear=linear, attention=attention, convolution=patches, moved=moved, calls=self.layers)
