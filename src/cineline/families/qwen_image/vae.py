"""Qwen-Image's VAE: Wan 2.1's modules with other weights, so that its decoder is cut as that one's (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALIKE = (
    *("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales"),
    *("temperal_downsample", "dropout", "latents_mean", "latents_std"),
)
"""Keys of its config that `AutoencoderKLWan` has too."""


def wan_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `vae/config.json` in Wan's words."""
    colours = int(config.get("input_channels", 3))
    alike = {name: config[name] for name in ALIKE if name in config}
    return {**alike, "in_channels": colours, "out_channels": colours}
