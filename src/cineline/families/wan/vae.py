"""Wan's VAEs: an image to its latents.

Legend: C latent channels, F' latent frames, H' x W' latents a frame.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from PIL import Image

from cineline.families.wan.shapes import Component
from cineline.families.wan.weights import weights_of
from cineline.weights.files import Weights

ENCODER = ("encoder", "quant_conv")
DECODER = ("decoder", "post_quant_conv")


def build_vae(component: Component) -> tuple[Any, Weights]:
    """The checkpoint's VAE on the meta device, and the weights that belong to it."""
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(dict(component.config))
    weights = weights_of(component)
    weights.check_names(vae.state_dict())
    return vae, weights


def load_half(component: Component, keep: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, int]:
    """The VAE with one of its halves only, and the bytes read for it."""
    vae, weights = build_vae(component)
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


class ImageEncoder:
    """The VAE's encoder, for first frames.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, component: Component, dtype: torch.dtype, device: torch.device) -> None:
        self._vae, self.bytes_read = load_half(component, ENCODER, dtype, device)
        self._dtype = dtype
        self._device = device
        self._statistics = statistics(self._vae.config, torch.float32, device)
        self._processor = VideoProcessor(vae_scale_factor=self._vae.config.scale_factor_spatial)

    def encode(
        self, image: Image.Image, last: Image.Image | None, height: int, width: int, num_frames: int
    ) -> torch.Tensor:
        """Normalised latents, float32 [1, C, F', H', W'], of a clip that begins with the image, goes on grey, and ends
        with another where there is one.

        As in diffusers' `WanImageToVideoPipeline.prepare_latents`.
        """
        first, *ends = (self._pixels(each, height, width) for each in (image, last) if each is not None)
        grey = first.new_zeros(1, first.shape[1], num_frames - 1 - len(ends), height, width)
        clip = torch.cat([first, grey, *ends], dim=2).to(self._dtype)
        latents = self._vae.encode(clip).latent_dist.mode().to(torch.float32)
        mean, inverse_std = self._statistics
        normalised: torch.Tensor = (latents - mean) * inverse_std
        return normalised

    def _pixels(self, image: Image.Image, height: int, width: int) -> torch.Tensor:
        """One frame, float32 [1, 3, 1, height, width]."""
        pixels: torch.Tensor = self._processor.preprocess(image, height=height, width=width)
        return pixels.to(self._device, torch.float32).unsqueeze(2)
