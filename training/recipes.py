"""The two mini models as data: shapes, and how long each stage trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.loop import Schedule
from training.text import DIM as TEXT_DIM
from training.transformer import Batch
from training.vae import Phase, Windows

FRAMES = 17
"""Of a clip, and of a video by default."""

CLIPS = 8_000
"""Encoded once for the transformer's training."""

TEXT = Batch("text", 48)
IMAGE = Batch("image", 48)
PICTURE = Batch("picture", 128)
POLISH = [TEXT, TEXT, IMAGE, PICTURE, PICTURE]

IMAGES = Windows(clips=24, frames=1, size=32)
SMALL = Windows(clips=8, frames=9, size=32)
MEDIUM = Windows(clips=2, frames=9, size=64)


@dataclass(frozen=True)
class Recipe:
    """A model's shapes and training.

    Attributes:
        side: of a clip in pixels, and of a video by default.
        vae: config of its AutoencoderKLWan.
        vae_phases, vae_schedule: training of the VAE.
        transformer: config of its WanTransformer3DModel; of both experts where there is a boundary ratio.
        pictures: first training of the transformer, on single frames.
        batches, video: second training, on everything.
        boundary_ratio: share of the timesteps where the low-noise expert takes over, None for one transformer.
        polish: last training of the one transformer, from a high rate down once more.
        high, low: last trainings of the two experts, copies of the transformer, each on its side of the boundary. The
            low-noise one draws the shapes, and takes longer.
    """

    side: int
    vae: Mapping[str, Any]
    vae_phases: Sequence[Phase]
    vae_schedule: Schedule
    transformer: Mapping[str, Any]
    pictures: Schedule
    batches: Sequence[Batch]
    video: Schedule
    boundary_ratio: float | None = None
    polish: Schedule | None = None
    high: Schedule | None = None
    low: Schedule | None = None

    @property
    def grid(self) -> int:
        """Tokens along a side of a clip."""
        return self.side // int(self.vae.get("scale_factor_spatial", 8)) // 2


def _transformer(head_dim: int, layers: int, ffn_dim: int) -> dict[str, Any]:
    return {
        "num_attention_heads": 4,
        "attention_head_dim": head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "ffn_dim": ffn_dim,
        "num_layers": layers,
    }


RECIPES = {
    "mini-ti2v": Recipe(
        side=128,
        vae={
            "base_dim": 8,
            "decoder_base_dim": 16,
            "z_dim": 16,
            "num_res_blocks": 1,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        },
        vae_phases=[
            Phase(0.2, [IMAGES]),
            Phase(0.85, [SMALL, SMALL, SMALL, MEDIUM]),
            Phase(1.0, [MEDIUM, Windows(clips=1, frames=FRAMES, size=128)]),
        ],
        vae_schedule=Schedule(steps=4000, matrices=4e-3),
        transformer=_transformer(48, 8, 768),
        pictures=Schedule(steps=600, matrices=3e-3, beta=0.98, flat=0.8, average=0.99),
        batches=[TEXT, TEXT, TEXT, IMAGE, PICTURE],
        video=Schedule(steps=2600, matrices=3e-3, beta=0.98),
        polish=Schedule(steps=650, matrices=3e-3, beta=0.98, flat=0.2),
    ),
    "mini-t2v": Recipe(
        side=64,
        vae={"base_dim": 8, "z_dim": 16, "num_res_blocks": 1},
        vae_phases=[
            Phase(0.2, [IMAGES]),
            Phase(0.8, [SMALL]),
            Phase(1.0, [SMALL, Windows(clips=2, frames=FRAMES, size=64)]),
        ],
        vae_schedule=Schedule(steps=3500, matrices=4e-3),
        transformer=_transformer(32, 8, 512),
        pictures=Schedule(steps=800, matrices=3e-3, beta=0.98, flat=0.8, average=0.99),
        batches=[TEXT, TEXT, TEXT, PICTURE],
        video=Schedule(steps=3200, matrices=3e-3, beta=0.98),
        boundary_ratio=0.875,
        high=Schedule(steps=400, matrices=6e-4, rest=2e-4, beta=0.98, flat=0.0),
        low=Schedule(steps=1600, matrices=3e-3, beta=0.98, flat=0.2),
    ),
}
