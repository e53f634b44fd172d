"""HunyuanVideo 1.5 as data, so that it can be planned for without a checkpoint (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cineline.families.hunyuan_video.spec import DEFAULTS, HunyuanVideoSpec, size_of
from cineline.families.qwen_vl_costs import SEVEN_BILLION

_BYT5_SMALL: Mapping[str, Any] = {
    "d_model": 1472,
    "d_kv": 64,
    "d_ff": 3584,
    "num_layers": 12,
    "num_heads": 6,
    "vocab_size": 1510,
}

_SIZES = {"480p": 640, "720p": 960}

KNOWN: Mapping[str, HunyuanVideoSpec] = {
    name: HunyuanVideoSpec(
        Path(name),
        {
            "transformer": {"target_size": target},
            "text_encoder": SEVEN_BILLION,
            "text_encoder_2": _BYT5_SMALL,
            "vae": {},
            "scheduler": {},
            "guider": {},
        },
        {**DEFAULTS, **size_of({"target_size": target})},
    )
    for size, target in _SIZES.items()
    for name in (f"hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-{size}_t2v",)
}
"""By hub id; what a config leaves out is as in diffusers, whose defaults are this model's."""
