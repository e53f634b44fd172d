"""Names and shapes of a component's tensors, as diffusers and transformers call them, by its config (no torch).

So that a file that lacks one, or has another, is refused before any rank starts.

Legend: D a model's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cineline.errors import CheckpointError, shown
from cineline.families.wan.costs.text import TextCosts
from cineline.families.wan.recognise import IMAGES, Found
from cineline.families.wan_vae.cost_units import Conv, Unit
from cineline.families.wan_vae.costs import VaeCosts
from cineline.weights.sources import listed, without_leading_ones

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

EMBEDDING, TIED = "shared.weight", "encoder.embed_tokens.weight"
"""The text encoder's embedding has two names, of which one is enough."""

KERNELS: Mapping[int, Shape] = {27: (3, 3, 3), 9: (3, 3), 3: (3, 1, 1), 1: (1, 1, 1)}
"""Of the VAEs' convolutions, by volume."""


def check_tensors(found: Found, config: Mapping[str, Any]) -> None:
    """Hold what a file has against what its component is made of.

    Raises:
        CheckpointError: tensors are missing, extra or misshapen; the first ones are named, and how many there are.
    """
    source, names = found.source, dict(found.names)
    wanted = TENSORS[found.component](config)
    if TIED in names:
        other = names.pop(TIED)
        names.setdefault(EMBEDDING, other)
    if missing := sorted(wanted.keys() - names.keys()):
        raise CheckpointError(f"{shown(source.path)} lacks {listed(missing)}: download it again.")
    if extra := sorted(names[name] for name in names.keys() - wanted.keys()):
        raise CheckpointError(
            f"{shown(source.path)} has {listed(extra)} that its config does not know: use another file, or give "
            "the folder that it belongs to with --model."
        )
    shapes = {name: source.stored[names[name]].shape for name in wanted}
    odd = [name for name in wanted if without_leading_ones(shapes[name]) != without_leading_ones(wanted[name])]
    if odd:
        have = "has shape" if len(odd) == 1 else "have shapes such as"
        raise CheckpointError(
            f"{shown(source.path)}: {listed([names[name] for name in odd])} {have} {shown(list(shapes[odd[0]]))}, but "
            f"the others say {shown(list(wanted[odd[0]]))}: download it again."
        )


def transformer_tensors(config: Mapping[str, Any]) -> Shapes:
    """Of diffusers' `WanTransformer3DModel`."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = tuple(config["patch_size"])
    made = _biased("patch_embedding", width, config["in_channels"], *patch)
    made |= _embedder("condition_embedder.time_embedder", width, config["freq_dim"])
    made |= _embedder("condition_embedder.text_embedder", width, config["text_dim"])
    made |= _biased("condition_embedder.time_proj", 6 * width, width)
    if config["image_dim"]:
        made |= _image_embedder(IMAGES, width, config["image_dim"], config["pos_embed_seq_len"])
    for number in range(config["num_layers"]):
        block = f"blocks.{number}"
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                made |= _biased(f"{attention}.{part}", width, width)
            made |= {f"{attention}.{norm}.weight": (width,) for norm in ("norm_q", "norm_k")}
        if config["cross_attn_norm"]:
            made |= _biased(f"{block}.norm2", width)
        if added := config["added_kv_proj_dim"]:
            made |= _biased(f"{block}.attn2.add_k_proj", width, added) | _biased(
                f"{block}.attn2.add_v_proj", width, added
            )
            made[f"{block}.attn2.norm_added_k.weight"] = (width,)
        made |= _biased(f"{block}.ffn.net.0.proj", config["ffn_dim"], width)
        made |= _biased(f"{block}.ffn.net.2", width, config["ffn_dim"])
        made[f"{block}.scale_shift_table"] = (1, 6, width)
    made |= _biased("proj_out", config["out_channels"] * math.prod(patch), width)
    return made | {"scale_shift_table": (1, 2, width)}


def text_tensors(config: Mapping[str, Any]) -> Shapes:
    """Of transformers' `UMT5EncoderModel`, whose linear layers have no biases."""
    sizes = TextCosts.of(config)
    width, inner = sizes.width, sizes.inner
    made: Shapes = {EMBEDDING: (sizes.vocabulary, width), "encoder.final_layer_norm.weight": (width,)}
    for number in range(sizes.layers):
        first, second = (f"encoder.block.{number}.layer.{half}" for half in (0, 1))
        made |= {f"{first}.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
        made[f"{first}.SelfAttention.o.weight"] = (width, inner)
        made[f"{first}.SelfAttention.relative_attention_bias.weight"] = (sizes.buckets, sizes.heads)
        for part in ("wi_0", "wi_1") if sizes.gated else ("wi",):
            made[f"{second}.DenseReluDense.{part}.weight"] = (sizes.ffn, width)
        made[f"{second}.DenseReluDense.wo.weight"] = (width, sizes.ffn)
        made |= {f"{half}.layer_norm.weight": (width,) for half in (first, second)}
    return made


def vae_tensors(config: Mapping[str, Any]) -> Shapes:
    """Of diffusers' `AutoencoderKLWan`."""
    costs = VaeCosts.of(config)
    made = _biased("quant_conv", *[2 * costs.latents] * 2, 1, 1, 1) | _biased(
        "post_quant_conv", *[costs.latents] * 2, 1, 1, 1
    )
    for name, unit in zip(_encoder_names(costs.encoder, bool(config.get("is_residual"))), costs.encoder, strict=True):
        made |= _unit(f"encoder.{name}", unit)
    for unit in costs.decoder:
        made |= _unit(f"decoder.{unit.name}", unit)
    return made


def _encoder_names(units: Sequence[Unit], is_grouped: bool) -> list[str]:
    """As diffusers calls the encoder's units: those of Wan 2.1's blocks stand in one row."""
    names = [unit.name for unit in units]
    if is_grouped:
        return names
    row = [name for name in names if name.startswith("down_blocks.")]
    return [f"down_blocks.{row.index(name)}" if name in row else name for name in names]


def _unit(name: str, unit: Unit) -> Shapes:
    """The tensors of one of a VAE's units."""
    wide, given, convs = (unit.taken.channels, 1, 1, 1), (unit.given.channels, 1, 1, 1), unit.convs
    if unit.name == "head":
        parent = name.removesuffix("head")
        return {f"{parent}norm_out.gamma": wide} | _convs(convs, f"{parent}conv_out")
    if unit.attends:
        flat = [
            _biased(f"{name}.{part}", one.given.channels, one.taken.channels, 1, 1)
            for part, one in zip(("to_qkv", "proj"), convs, strict=True)
        ]
        return {f"{name}.norm.gamma": wide[:3]} | flat[0] | flat[1]
    if "sampler" in unit.name:
        return _convs(convs, f"{name}.resample.1", f"{name}.time_conv")
    if "resnets" in unit.name:
        norms = {f"{name}.norm1.gamma": wide, f"{name}.norm2.gamma": given}
        return norms | _convs(convs, f"{name}.conv1", f"{name}.conv2", f"{name}.conv_shortcut")
    return _convs(convs, name)


def _convs(convs: Sequence[Conv], *names: str) -> Shapes:
    made: Shapes = {}
    for name, conv in zip(names, convs, strict=False):
        made |= _biased(name, conv.given.channels, conv.taken.channels, *KERNELS[conv.volume])
    return made


def _image_embedder(name: str, width: int, taken: int, positions: int | None) -> Shapes:
    """Wan 2.1's, of what an image encoder makes."""
    made = _biased(f"{name}.norm1", taken) | _biased(f"{name}.norm2", width)
    made |= _biased(f"{name}.ff.net.0.proj", taken, taken) | _biased(f"{name}.ff.net.2", width, taken)
    return made | ({f"{name}.pos_embed": (1, positions, taken)} if positions else {})


def _embedder(name: str, width: int, taken: int) -> Shapes:
    return _biased(f"{name}.linear_1", width, taken) | _biased(f"{name}.linear_2", width, width)


def _biased(name: str, *shape: int) -> Shapes:
    """A weight, and a bias of its first size."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


TENSORS: Mapping[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "transformer": transformer_tensors,
    "text_encoder": text_tensors,
    "vae": vae_tensors,
}
"""By component."""
