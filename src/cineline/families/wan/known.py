"""The Wan 2.2 and 2.1 models as data, so that they can be planned for without a checkpoint, and run from files of
weights that have no configs (no torch).

The VAEs' statistics of latents are those of the public repository (Wan2.2, wan/modules/vae2_1.py and vae2_2.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec, default_request

_TRANSFORMER: Mapping[str, Any] = {
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}

_5B = {"num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
_14B = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824, "out_channels": 16}
_1_3B = {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960, "in_channels": 16, "out_channels": 16}
_OF_IMAGES = {**_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
"""Wan 2.1's, with a CLIP encoder."""

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
    "latents_mean": [
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ],
    "latents_std": [
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ],
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
    "latents_mean": [
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
        *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
        *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ],
    "latents_std": [
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
        *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
        *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ],
}


_CLIP: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}
"""ViT-H/14."""


def _spec(
    name: str,
    kind: WanKind,
    shape: Mapping[str, Any],
    vae: Mapping[str, Any],
    shift: float,
    boundary: float | None = None,
) -> WanSpec:
    experts = ("transformer",) if boundary is None else ("transformer", "transformer_2")
    transformer = {**_TRANSFORMER, **shape}
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    return WanSpec(
        folder=Path(name),
        kind=kind,
        transformer=transformer,
        experts=experts,
        vae=vae,
        text=_UMT5_XXL,
        scheduler=scheduler | {"num_train_timesteps": 1000},
        scheduler_class="UniPCMultistepScheduler",
        boundary_ratio=boundary,
        defaults=default_request(kind, transformer, len(experts)),
        image=_CLIP if transformer["image_dim"] else None,
    )


KNOWN: Mapping[str, WanSpec] = {
    str(spec.folder): spec
    for spec in (
        _spec("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "ti2v", _5B, _VAE_22, 5.0),
        _spec("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "t2v", {**_14B, "in_channels": 16}, _VAE_21, 12.0, 0.875),
        _spec("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "i2v", {**_14B, "in_channels": 36}, _VAE_21, 5.0, 0.900),
        _spec("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "t2v", _1_3B, _VAE_21, 5.0),
        _spec("Wan-AI/Wan2.1-T2V-14B-Diffusers", "t2v", {**_14B, "in_channels": 16}, _VAE_21, 5.0),
        _spec("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "i2v", _OF_IMAGES, _VAE_21, 3.0),
        _spec("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "i2v", _OF_IMAGES, _VAE_21, 5.0),
        _spec("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", "i2v", {**_OF_IMAGES, "pos_embed_seq_len": 514}, _VAE_21, 16.0),
    )
}
"""By hub id, with the official flow shifts (some converted checkpoints carry 3.0; a checkpoint on disk is read)."""
