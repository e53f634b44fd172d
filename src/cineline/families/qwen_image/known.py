"""Qwen-Image as data, so that it can be planned for without a checkpoint (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cineline.families.qwen_image.spec import DEFAULTS, QwenImageSpec
from cineline.families.qwen_vl_costs import SEVEN_BILLION

KNOWN: Mapping[str, QwenImageSpec] = {
    name: QwenImageSpec(
        Path(name), {"transformer": {}, "text_encoder": SEVEN_BILLION, "vae": {}, "scheduler": {}}, DEFAULTS
    )
    for name in ("Qwen/Qwen-Image", "Qwen/Qwen-Image-2512")
}
"""By hub id; what a config leaves out is as in diffusers, whose defaults are this model's."""
