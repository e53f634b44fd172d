"""Frames as the engine is told them."""

from __future__ import annotations

import torch
from diffusers.video_processor import VideoProcessor
from torch import Tensor


def quantise(processor: VideoProcessor, pixels: Tensor) -> Tensor:
    """Frames uint8 [F, H, W, 3] of pixels [1, 3, F, H, W] in -1 to 1."""
    frames: Tensor = processor.postprocess_video(pixels, output_type="pt")[0].permute(0, 2, 3, 1).float()
    return (frames * 255).round().to(torch.uint8).contiguous()
