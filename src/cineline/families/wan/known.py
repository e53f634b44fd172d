"""The three Wan 2.2 models as data, so that they can be planned for without a checkpoint (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WAN_DEFAULTS, WanSpec

_TRANSFORMER: Mapping[str, Any] = {
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}

_5B = {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_A14B = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824, "out_channels": 16}

_UMT5_XXL: Mapping[str, Any] = {
    "num_layers": 24,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "vocab_size": 256384,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}

_VAE_21: Mapping[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}

_VAE_22: Mapping[str, Any] = {
    **_VAE_21,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}


def _spec(
    name: str, kind: WanKind, shape: Mapping[str, Any], vae: Mapping[str, Any], shift: float, boundary: float | None
) -> WanSpec:
    experts = ("transformer",) if boundary is None else ("transformer", "transformer_2")
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return WanSpec(
        folder=Path(name),
        kind=kind,
        transformer={**_TRANSFORMER, **shape},
        experts=experts,
        vae=vae,
        text=_UMT5_XXL,
        scheduler=scheduler | {"num_train_timesteps": 1000},
        scheduler_class="UniPCMultistepScheduler",
        boundary_ratio=boundary,
        defaults=WAN_DEFAULTS[kind],
    )


KNOWN: Mapping[str, WanSpec] = {
    str(spec.folder): spec
    for spec in (
        _spec("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "ti2v", _5B, _VAE_22, 5.0, None),
        _spec("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "t2v", {**_A14B, "in_channels": 16}, _VAE_21, 12.0, 0.875),
        _spec("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "i2v", {**_A14B, "in_channels": 36}, _VAE_21, 5.0, 0.900),
    )
}
"""By hub id, with the official flow shifts (some converted checkpoints carry 3.0; a checkpoint on disk is read)."""
