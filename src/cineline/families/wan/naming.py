"""What a file of tensors is, by their names alone, and how diffusers calls each of them (no torch).

The maps are those of diffusers' `convert_wan_transformer_to_diffusers` and `convert_wan_vae_to_diffusers`
(loaders/single_file_utils.py), of `convert_vae_22` (scripts/convert_wan_to_diffusers.py), and of llama.cpp's T5 names
(gguf-py, `tensor_mapping.py`); the original text encoder is Wan's own module `T5Encoder` (wan/modules/t5.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "first_stage_model.", "model.", "vae.")
"""Before all names of some files."""

Rename = Callable[[str], str]


def _attention(stored: str, ours: str) -> dict[str, str]:
    parts = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
    return {f"{stored}.{part}": f"{ours}.{own}" for part, own in parts.items()}


TRANSFORMER: Mapping[str, str] = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}
TRANSFORMER_BLOCK: Mapping[str, str] = {
    **_attention("self_attn", "attn1"),
    **_attention("cross_attn", "attn2"),
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm2": "norm3",  # they change places
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}

T5: Mapping[str, str] = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
T5_BLOCK: Mapping[str, str] = {
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}

LLAMA: Mapping[str, str] = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
LLAMA_BLOCK: Mapping[str, str] = {
    **{f"attn_{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}

VAE: Mapping[str, str] = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **{
        f"{half}.{stored}": f"{half}.{ours}"
        for half in ("encoder", "decoder")
        for stored, ours in {
            "conv1": "conv_in",
            "head.0": "norm_out",
            "head.2": "conv_out",
            "middle.0": "mid_block.resnets.0",
            "middle.1": "mid_block.attentions.0",
            "middle.2": "mid_block.resnets.1",
        }.items()
    },
}
VAE_RESIDUAL: Mapping[str, str] = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


@dataclass(frozen=True)
class Naming:
    """One way to call a component's tensors.

    Attributes:
        component: transformer, vae or text_encoder.
        marker: a name that no other way has.
        rename: given all names, from a stored one to diffusers'.
    """

    component: str
    marker: str
    rename: Callable[[Collection[str]], Rename]


def by_tables(blocks: str, ours: str, top: Mapping[str, str], block: Mapping[str, str]) -> Callable[..., Rename]:
    """Names as `<blocks>N.<module>.<leaf>` and `<module>.<leaf>`, by tables of the modules."""
    pattern = re.compile(rf"{re.escape(blocks)}(\d+)\.(.+)")

    def rename(name: str) -> str:
        found = pattern.fullmatch(name)
        return f"{ours}{found[1]}.{_moved(found[2], block)}" if found else _moved(name, top)

    return lambda names: rename


def same(names: Collection[str]) -> Rename:
    """Names that are diffusers' own."""
    return lambda name: name


def vae_21(names: Collection[str]) -> Rename:
    """Wan 2.1's VAE: all blocks of a half in one row, of which the decoder's are grouped in diffusers."""
    pattern = re.compile(r"(encoder\.down|decoder\.up)samples\.(\d+)\.(.+)")
    ends = re.compile(r"decoder\.upsamples\.(\d+)\.resample\..+")
    row = min((int(found[1]) for name in names if (found := ends.fullmatch(name))), default=0) + 1

    def rename(name: str) -> str:
        found = pattern.fullmatch(name)
        if found is None:
            return _residual(_moved_deep(name))
        half, number, rest = found[1], int(found[2]), found[3]
        if half == "encoder.down":
            return f"encoder.down_blocks.{number}.{_residual(rest)}"
        group, place = divmod(number, row)
        if rest.startswith(("resample.", "time_conv.")):
            return f"decoder.up_blocks.{group}.upsamplers.0.{rest}"
        return f"decoder.up_blocks.{group}.resnets.{place}.{_residual(rest)}"

    return rename


def vae_22(names: Collection[str]) -> Rename:
    """Wan 2.2's VAE: blocks in groups, whose last one may change the size."""
    pattern = re.compile(r"(encoder|decoder)\.(down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.(.+)")

    def rename(name: str) -> str:
        found = pattern.fullmatch(name)
        if found is None:
            return _residual(_moved_deep(name))
        half, way, group, place, rest = found.groups()
        inner = f"{way}sampler" if rest.startswith(("resample.", "time_conv.")) else f"resnets.{place}"
        return f"{half}.{way}_blocks.{group}.{inner}.{_residual(rest)}"

    return rename


NAMINGS = (
    Naming("transformer", "head.modulation", by_tables("blocks.", "blocks.", TRANSFORMER, TRANSFORMER_BLOCK)),
    Naming("transformer", "condition_embedder.time_embedder.linear_1.weight", same),
    Naming("vae", "decoder.upsamples.0.upsamples.0.residual.2.weight", vae_22),
    Naming("vae", "decoder.middle.0.residual.0.gamma", vae_21),
    Naming("vae", "decoder.mid_block.resnets.0.norm1.gamma", same),
    Naming("text_encoder", "token_embedding.weight", by_tables("blocks.", "encoder.block.", T5, T5_BLOCK)),
    Naming("text_encoder", "token_embd.weight", by_tables("enc.blk.", "encoder.block.", LLAMA, LLAMA_BLOCK)),
    Naming("text_encoder", "encoder.block.0.layer.0.SelfAttention.q.weight", same),
)
"""Looked for in this order: Wan 2.2's VAE has the marker of Wan 2.1's, too."""


def naming_of(names: Collection[str]) -> tuple[Naming, str] | None:
    """How these names are made, and the prefix that all of them have; None for anything else."""
    for prefix in ("", *PREFIXES):
        for naming in NAMINGS:
            if f"{prefix}{naming.marker}" in names:
                return naming, prefix
    return None


def components_in(names: Collection[str]) -> list[str]:
    """Those that have a tensor here which no other has, whatever stands before its name."""
    ends = {naming.marker: naming.component for naming in NAMINGS}
    found = {ends[marker] for name in names for marker in ends if name == marker or name.endswith(f".{marker}")}
    return sorted(found)


def diffusers_names(names: Collection[str], naming: Naming, prefix: str) -> dict[str, str]:
    """diffusers' name to the stored one; a name that the way does not know stays as it is."""
    rename = naming.rename([name.removeprefix(prefix) for name in names])
    return {rename(name.removeprefix(prefix)): name for name in names}


def _moved(name: str, table: Mapping[str, str]) -> str:
    """A tensor's name, its module's by the table."""
    module, _, leaf = name.rpartition(".")
    return table[name] if name in table else f"{table.get(module, module)}.{leaf}" if module else name


def _moved_deep(name: str) -> str:
    """The same, where the table has the first words of a VAE's module."""
    for stored, ours in VAE.items():
        if name.startswith(f"{stored}."):
            return f"{ours}.{name.removeprefix(f'{stored}.')}"
    return name


def _residual(name: str) -> str:
    """The words of a residual block, which stand before the leaf."""
    start, _, leaf = name.rpartition(".")
    for stored, ours in VAE_RESIDUAL.items():
        if start == stored or start.endswith(f".{stored}"):
            return f"{start.removesuffix(stored)}{ours}.{leaf}"
    return name
