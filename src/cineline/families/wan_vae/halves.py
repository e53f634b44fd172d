"""The VAE's halves, each with no weights but its own.

Legend: C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from cineline.weights.files import Weights

ENCODER = ("encoder", "quant_conv")
DECODER = ("decoder", "post_quant_conv")


@dataclass(frozen=True)
class VaeFiles:
    """A checkpoint's VAE.

    Attributes:
        config: of diffusers' `AutoencoderKLWan`. open: its weights, by that one's names.
    """

    config: Mapping[str, Any]
    open: Callable[[], Weights]


def build_vae(files: VaeFiles) -> tuple[Any, Weights]:
    """The VAE on the meta device, and the weights that belong to it."""
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(dict(files.config))
    weights = files.open()
    weights.check_names(vae.state_dict())
    return vae, weights


def load_half(files: VaeFiles, keep: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, int]:
    """The VAE with one of its halves only, and the bytes read for it."""
    vae, weights = build_vae(files)
    for name in (*ENCODER, *DECODER):
        if name not in keep:
            delattr(vae, name)
    weights.load(vae, dtype, device)
    return vae, weights.bytes_read


def statistics(config: Any, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / standard deviation of the latents' channels, [1, C, 1, 1, 1], by the VAE's config.

    For loading: an accelerator stops for numbers that come from the host.
    """
    shape = (1, config.z_dim, 1, 1, 1)
    mean = torch.tensor(config.latents_mean).view(shape).to(device, dtype)
    std = torch.tensor(config.latents_std).view(shape).to(device, dtype)
    return mean, 1.0 / std
