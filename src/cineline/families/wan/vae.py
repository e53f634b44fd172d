"""The VAE of a Wan checkpoint, and its encoder: an image to its latents.

Legend: C latent channels, F' latent frames, H' x W' latents a frame.
"""

from __future__ import annotations

from functools import partial

import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from cineline.families.wan.shapes import WanShapes
from cineline.families.wan.weights import weights_of
from cineline.families.wan_vae.halves import ENCODER, VaeFiles, load_half, statistics


def vae_of(model: WanShapes) -> VaeFiles:
    """A model's."""
    component = model.component("vae")
    return VaeFiles(component.config, partial(weights_of, component))


class ImageEncoder:
    """The VAE's encoder, for first frames.

    Attributes:
        bytes_read: of the weights.
    """

    def __init__(self, files: VaeFiles, dtype: torch.dtype, device: torch.device) -> None:
        self._vae, self.bytes_read = load_half(files, ENCODER, dtype, device)
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
