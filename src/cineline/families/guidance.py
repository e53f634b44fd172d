"""Guidance, which families have alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cineline.core.request import Branch


def combine(predictions: Mapping[Branch, torch.Tensor], guidance: float) -> torch.Tensor:
    """Classifier-free guidance, uncond + g (cond - uncond) (Ho & Salimans 2022, arXiv 2207.12598)."""
    cond = predictions[Branch.COND]
    if Branch.UNCOND not in predictions:
        return cond
    uncond = predictions[Branch.UNCOND]
    return uncond + guidance * (cond - uncond)
