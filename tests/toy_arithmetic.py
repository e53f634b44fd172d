"""What the toy family's cut model and its model in one piece compute alike. Legend: C channels."""

from __future__ import annotations

import torch

C = 3
TEXT_LAYERS, DECODER_UNITS = 3, 5


def block(layer: int, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    weight = torch.sin(torch.arange(C * C, dtype=torch.float32) + layer).view(C, C)
    return torch.tanh(hidden @ weight + text)


def text_of(prompt: str) -> torch.Tensor:
    return torch.full((C,), sum(map(ord, prompt)) % 97 / 97)


def text_layer(text: torch.Tensor, layer: int) -> torch.Tensor:
    return torch.sin(text + layer)


def decoder_unit(pixel: torch.Tensor, unit: int) -> torch.Tensor:
    return torch.tanh(pixel * 1.5 + unit / 8)


def quantise(pixel: torch.Tensor) -> torch.Tensor:
    return (pixel.view(1, 1, 1, C) * 127 + 128).byte()


def step_of(latents: torch.Tensor, prediction: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return latents - 0.3 * prediction + 0.1 * before


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
