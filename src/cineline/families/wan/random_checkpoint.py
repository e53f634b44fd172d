"""Small Wan checkpoints with random weights, in diffusers format: for tests and benchmarks.

They have the real classes and file layout, and make noise instead of pictures.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.utils.logging import disable_progress_bar

from cineline.families.wan.shapes import WanKind

IMAGE_SIDE, IMAGE_WIDTH, IMAGE_ROWS = 12, 20, 10
"""Pixels a side, width and rows of what the image encoder makes."""


@dataclass(frozen=True)
class RandomConfig:
    """Shapes of a random checkpoint.

    Attributes:
        kind, generation: which Wan model it is like. pictures: that the image encoder of generation 2.1 sees.
        layers, heads, head_dim, ffn_dim: of the transformer(s).
        text_layers, text_width: of the text encoder. vae_width: channels of the VAE at full size.
        seed: of the weights.
        latent_channels: of the VAE's latents.
        boundary_ratio: of the two-expert kinds.
        flow_shift: of the solver.
        max_shard_size: of the transformer's files.
    """

    kind: WanKind = "ti2v"
    layers: int = 4
    heads: int = 2
    head_dim: int = 24
    ffn_dim: int = 96
    text_layers: int = 2
    text_width: int = 32
    vae_width: int = 4
    latent_channels: int = 16
    seed: int = 0
    boundary_ratio: float = 0.875
    flow_shift: float = 5.0
    max_shard_size: str = "5GB"
    generation: Literal["2.1", "2.2"] = "2.2"
    pictures: int = 1

    @property
    def sees(self) -> bool:
        """Whether there is an image encoder."""
        return self.kind == "i2v" and self.generation == "2.1"


def save_random_checkpoint(folder: Path, config: RandomConfig) -> Path:
    """Build the checkpoint and put it at `folder`, complete or not at all; returns `folder`."""
    disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        unfinished = Path(temporary) / "checkpoint"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            _build(config).save_pretrained(unfinished, max_shard_size=config.max_shard_size)
        unfinished.rename(folder)
    return folder


def _build(config: RandomConfig) -> WanPipeline | WanImageToVideoPipeline:
    two_experts = config.kind != "ti2v" and config.generation == "2.2"
    vae = random_vae(config.kind, config.vae_width, config.latent_channels)
    channels = vae.config.z_dim
    tokenizer = _tokenizer()
    components = {
        "tokenizer": tokenizer,
        "text_encoder": _text_encoder(len(tokenizer), config.text_layers, config.text_width),
        "vae": vae,
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.flow_shift,
            num_train_timesteps=1000,
        ),
        "transformer": _transformer(config, channels),
        "transformer_2": _transformer(config, channels) if two_experts else None,
        "boundary_ratio": config.boundary_ratio if two_experts else None,
        "expand_timesteps": config.kind == "ti2v",
    }
    if config.sees:
        components |= {"image_encoder": _image_encoder(), "image_processor": _image_processor()}
    return WanImageToVideoPipeline(**components) if config.kind == "i2v" else WanPipeline(**components)


def _transformer(config: RandomConfig, latent_channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        in_channels=2 * latent_channels + 4 if config.kind == "i2v" else latent_channels,
        out_channels=latent_channels,
        text_dim=config.text_width,
        freq_dim=64,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        image_dim=IMAGE_WIDTH if config.sees else None,
        added_kv_proj_dim=config.heads * config.head_dim if config.sees else None,
        pos_embed_seq_len=2 * IMAGE_ROWS if config.sees and config.pictures == 2 else None,
    )


def random_vae(kind: WanKind, width: int = 4, channels: int = 16, **changes: Any) -> AutoencoderKLWan:
    """The VAE of such a model with random weights, its width and channels of latents, and `changes` to its config."""
    statistics = {
        "latents_mean": [0.1 * (channel % 5 - 2) for channel in range(channels)],
        "latents_std": [0.5 + 0.1 * (channel % 7) for channel in range(channels)],
    }
    shape = {"base_dim": width, "z_dim": channels, "num_res_blocks": 1}
    if kind == "ti2v":  # the Wan 2.2 VAE
        shape |= {
            "decoder_base_dim": 2 * width,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 16,
        }
    return AutoencoderKLWan(**shape | statistics | changes)


def _image_encoder() -> CLIPVisionModel:
    shape = {"hidden_size": IMAGE_WIDTH, "intermediate_size": 2 * IMAGE_WIDTH, "num_attention_heads": 2}
    patches = {"image_size": IMAGE_SIDE, "patch_size": IMAGE_SIDE // 3}
    return CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=3, hidden_act="gelu", **shape, **patches))


def _image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIDE}, crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE})


def _text_encoder(tokens: int, layers: int, width: int) -> UMT5EncoderModel:
    shape = {"d_model": width, "d_kv": width // 4, "d_ff": 2 * width, "num_layers": layers, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(vocab_size=tokens, **shape))


def _tokenizer() -> T5Tokenizer:
    """Letter by letter: no vocabulary file can be downloaded, and none is needed here."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    letters = [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,'-!?"]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0)
