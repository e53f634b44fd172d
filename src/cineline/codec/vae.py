"""Wan's VAEs: an image to its latents on the head, latents to frames on the tail.

Legend: C latent channels, F' latent frames, H' x W' latents a frame; F frames of H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from diffusers.video_processor import VideoProcessor
from PIL import Image

from cineline.models.weights import Weights

ENCODER = ("encoder", "quant_conv")
DECODER = ("decoder", "post_quant_conv")


def _load_half(folder: Path, keep: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> tuple[Any, int]:
    """The VAE with one of its halves only, and the bytes read for it."""
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder / "vae"))
    weights = Weights(folder / "vae")
    weights.check_names(vae.state_dict())
    for name in (*ENCODER, *DECODER):
        if name not in keep:
            delattr(vae, name)
    weights.load(vae, dtype, device)
    return vae, weights.bytes_read


def _statistics(vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1 / standard deviation of the latents' channels, [1, C, 1, 1, 1]."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    std = torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
    return mean, 1.0 / std


class ImageEncoder:
    """The VAE's encoder, for first frames.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._vae, self.bytes_read = _load_half(folder, ENCODER, dtype, device)
        self._dtype = dtype
        self._device = device
        self._processor = VideoProcessor(vae_scale_factor=self._vae.config.scale_factor_spatial)

    def encode(self, image: Image.Image, height: int, width: int, num_frames: int) -> torch.Tensor:
        """Normalised latents, float32 [1, C, F', H', W'], of a clip that begins with the image and goes on grey.

        As in diffusers' `WanImageToVideoPipeline.prepare_latents`.
        """
        first = self._processor.preprocess(image, height=height, width=width).to(self._device, torch.float32)
        first = first.unsqueeze(2)
        rest = first.new_zeros(1, first.shape[1], num_frames - 1, height, width)
        clip = torch.cat([first, rest], dim=2).to(self._dtype)
        latents = self._vae.encode(clip).latent_dist.mode().to(torch.float32)
        mean, inverse_std = _statistics(self._vae, latents)
        normalised: torch.Tensor = (latents - mean) * inverse_std
        return normalised


@dataclass
class DecodeState:
    """One request's decode under way: latents [1, C, F', H', W'] and the causal convolutions' caches."""

    latents: torch.Tensor
    caches: list[torch.Tensor | str | None] = field(default_factory=list)


class FrameDecoder:
    """The VAE's decoder, one latent frame at a time.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._vae, self.bytes_read = _load_half(folder, DECODER, dtype, device)
        self._dtype = dtype
        self._device = device
        self._processor = VideoProcessor(vae_scale_factor=self._vae.config.scale_factor_spatial)

    def start(self, latents: torch.Tensor) -> DecodeState:
        """Begin with a request's final latents, [1, C, F', H', W']."""
        latents = latents.to(self._device, self._dtype)
        mean, inverse_std = _statistics(self._vae, latents)
        latents = self._vae.post_quant_conv(latents / inverse_std + mean)
        count = self._vae._cached_conv_counts["decoder"]
        return DecodeState(latents, [None] * count)

    def decode(self, state: DecodeState, chunk: int) -> np.ndarray:
        """Frames uint8 [F, H, W, 3] of latent frame `chunk`: 1 frame of the first, the temporal scale of the others.

        As in diffusers' `AutoencoderKLWan._decode` and `VaeImageProcessor.numpy_to_pil`.
        """
        pixels = self._vae.decoder(
            state.latents[:, :, chunk : chunk + 1],
            feat_cache=state.caches,
            feat_idx=[0],
            **({"first_chunk": True} if chunk == 0 else {}),
        )
        if self._vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self._vae.config.patch_size)
        pixels = torch.clamp(pixels, min=-1.0, max=1.0)
        frames = self._processor.postprocess_video(pixels, output_type="np")[0]
        quantised: np.ndarray = (frames * 255).round().astype("uint8")
        return quantised
