"""What a file of weights is: the component, and the config that its tensors' shapes say (no torch but to read).

Nothing is concluded from a width or from a file's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cineline.errors import CheckpointError, shown
from cineline.families.wan.naming import components_in, diffusers_names, naming_of
from cineline.families.wan.shapes import WanKind
from cineline.weights.scaled import scales_of
from cineline.weights.sources import Source, open_source

KINDS: Mapping[tuple[int, int], WanKind] = {(48, 48): "ti2v", (16, 16): "t2v", (36, 16): "i2v"}
"""By a transformer's channels in and out."""

STRANGERS: Mapping[str, str] = {
    "vace": "a VACE model",
    "face_adapter": "an Animate model",
    "motion_encoder": "an Animate model",
    "pose_patch_embedding": "an Animate model",
    "casual_audio_encoder": "a speech-to-video model (S2V)",
    "audio_injector": "a speech-to-video model (S2V)",
    "cond_encoder": "a speech-to-video model (S2V)",
    "control_adapter": "a model with a control adapter",
    "ref_conv": "a model with a control adapter",
    "lora_": "a LoRA",
}
"""How parts of tensors' names begin in models that are not run here."""

SPIECE = "spiece_model"
"""A tensor of ComfyUI's text encoders: the bytes of the tokenizer's SentencePiece model."""

CALLED: Mapping[str, str] = {
    "transformer": "a Wan transformer",
    "vae": "a Wan VAE",
    "text_encoder": "a UMT5 text encoder",
}

IMAGES = "condition_embedder.image_embedder"
"""Where Wan 2.1's transformers embed what an image encoder makes."""


@dataclass(frozen=True)
class Found:
    """What was found in a file or folder.

    Attributes:
        component: transformer, vae or text_encoder.
        names: diffusers' name to the stored one.
    """

    source: Source
    component: str
    names: Mapping[str, str]

    def size(self, name: str) -> tuple[int, ...]:
        """A tensor's shape.

        Raises:
            CheckpointError: it is not there.
        """
        if name not in self.names:
            raise CheckpointError(f"{shown(self.source.path)} lacks tensor {shown(name)}: download it again.")
        return self.source.stored[self.names[name]].shape

    @property
    def sees(self) -> bool:
        """Whether a transformer embeds what an image encoder makes (Wan 2.1)."""
        return f"{IMAGES}.norm1.weight" in self.names

    def count(self, pattern: str) -> int:
        """How many different numbers stand at the pattern's one group, where it begins a name."""
        return len({found[1] for name in self.names if (found := re.match(pattern, name))})

    @property
    def channels(self) -> tuple[int, int]:
        """A transformer's, in and out."""
        patch = self.size("patch_embedding.weight")
        return patch[1], self.size("proj_out.weight")[0] // math.prod(patch[2:])


def look_into(path: Path) -> Found:
    """What a file holds, or a folder of a sharded component.

    Raises:
        CheckpointError: it cannot be read, or holds nothing that Cineline runs.
    """
    source = open_source(path)
    parts = {part: name for name in source.stored for part in name.split(".")}
    for word, what in STRANGERS.items():
        name = next((name for part, name in parts.items() if part.startswith(word)), None)
        if name is not None:
            remedy = "which Cineline does not run: use a Wan 2.2 TI2V-5B, T2V-A14B or I2V-A14B"
            if word == "lora_":
                remedy = "and no model: give it as --lora"
            raise CheckpointError(f"{shown(path)} is {what}, by its tensor {shown(name)}, {remedy}.")
    several = components_in(source.stored.keys())
    if len(several) > 1:
        raise CheckpointError(
            f"{shown(path)} holds {' and '.join(CALLED[one] for one in several)} in one file, and a file is one "
            "component here: use files of one each, as ComfyUI's templates for Wan 2.2 name them."
        )
    scales = scales_of(source)
    names = [name for name in source.stored if name not in scales.beside and name != SPIECE]
    known = naming_of(set(names))
    if known is None:
        raise CheckpointError(
            f"{shown(path)} holds no component of Wan 2.2 in a naming that is known (it has {len(names)} tensors, the "
            f"first one {shown(min(names, default=''))}): use one of those that docs/files.md lists."
        )
    naming, prefix = known
    found = diffusers_names(names, naming, prefix)
    if len(found) < len(names):
        twice = next(name for name in names if name not in found.values())
        raise CheckpointError(f"{shown(path)} has {shown(twice)} twice, with and without a prefix: use another file.")
    return Found(source, naming.component, found)


def transformer_config(found: Found, head_size: int) -> dict[str, Any]:
    """What a transformer's tensors say of its config, given the size of a head, which they do not.

    Raises:
        CheckpointError: the width is no multiple of it, or a tensor is missing.
    """
    width = found.size("scale_shift_table")[-1]
    if width % head_size:
        raise CheckpointError(
            f"{shown(found.source.path)} has width {width}, which heads of {head_size} do not divide: give the folder "
            "that its config is in with --model."
        )
    channels, out = found.channels
    return {
        "num_layers": found.count(r"blocks\.(\d+)\."),
        "num_attention_heads": width // head_size,
        "attention_head_dim": head_size,
        "in_channels": channels,
        "out_channels": out,
        "patch_size": list(found.size("patch_embedding.weight")[2:]),
        "ffn_dim": found.size("blocks.0.ffn.net.0.proj.weight")[0],
        "text_dim": found.size("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": found.size("condition_embedder.time_embedder.linear_1.weight")[1],
        "cross_attn_norm": "blocks.0.norm2.weight" in found.names,
        "image_dim": found.size(f"{IMAGES}.norm1.weight")[0] if found.sees else None,
        "added_kv_proj_dim": found.size("blocks.0.attn2.add_k_proj.weight")[1] if found.sees else None,
        "pos_embed_seq_len": found.size(f"{IMAGES}.pos_embed")[1] if f"{IMAGES}.pos_embed" in found.names else None,
    }


def vae_config(found: Found) -> dict[str, Any]:
    """What a VAE's tensors say of its config: which of Wan's two it is, and its sizes.

    Raises:
        CheckpointError: a tensor is missing.
    """
    is_residual = found.count(r"decoder\.up_blocks\.\d+\.(upsampler)\.") > 0
    wide = {"decoder_base_dim": found.size("decoder.conv_out.weight")[1]} if is_residual else {}
    return {
        "is_residual": is_residual,
        "z_dim": found.size("post_quant_conv.weight")[0],
        "base_dim": found.size("encoder.conv_in.weight")[0],
        "num_res_blocks": found.count(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.") - 1,
        **wide,
    }


def text_config(found: Found) -> dict[str, Any]:
    """What a text encoder's tensors say of its config.

    Raises:
        CheckpointError: a tensor is missing.
    """
    attention = "encoder.block.0.layer.0.SelfAttention"
    tokens = "shared.weight" if "shared.weight" in found.names else "encoder.embed_tokens.weight"
    rows, width = found.size(tokens)
    buckets, heads = found.size(f"{attention}.relative_attention_bias.weight")
    return {
        "num_layers": found.count(r"encoder\.block\.(\d+)\."),
        "d_model": width,
        "d_ff": found.size("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "d_kv": found.size(f"{attention}.q.weight")[0] // heads,
        "num_heads": heads,
        "vocab_size": rows,
        "relative_attention_num_buckets": buckets,
    }
