"""What each tensor of a LoRA belongs to in a Wan transformer, whoever has written it (no torch but to read)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from cineline.core.lora import Level
from cineline.errors import CheckpointError, shown
from cineline.families.wan.naming import TRANSFORMER, TRANSFORMER_BLOCK
from cineline.families.wan.shapes import WanShapes
from cineline.families.wan.tensors import transformer_tensors
from cineline.weights.lora import Adapter, Delta, Multiplier, role_of
from cineline.weights.sources import Source, open_source

PREFIX = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?(?:diffusion_model\.|(?P<first>transformer\.)|unet\.)?"
    r"(?:transformer_(?P<expert>[12])\.)?(?:lora_(?:unet|transformer)_+)?"
)
"""Before the names of modules. ai-toolkit has both experts in one file, numbered from 1; by diffusers' names the first
one has no number."""

LEVELS: Mapping[str, Level] = {"1": "high", "2": "low"}
EXPERTS: Mapping[Level, str] = {"high": "transformer", "low": "transformer_2"}

IMAGE_ENCODER = re.compile(
    r"(?:^|[._])(?:norm_k_img|k_img|v_img|img_emb|add_k_proj|add_v_proj|image_embedder)(?:[._]|$)"
)
"""Modules of Wan 2.1's image-to-video models, which the others have not. Their LoRAs run there without them, as in
diffusers."""


def adapters(spec: WanShapes, expert: str) -> dict[str, Adapter]:
    """Those of an expert by their names, in their order.

    Raises:
        CheckpointError: a file cannot be read, or is of another model.
    """
    made = {}
    for lora in spec.loras:
        if lora.level is None or EXPERTS[lora.level] == expert:
            source = open_source(lora.path)
            deltas = deltas_of(spec, source, "low" if expert == "transformer_2" else "high")
            made[lora.name] = Adapter(source, deltas, lora.scale)
    return made


def deltas_of(spec: WanShapes, source: Source, level: Level) -> dict[str, Delta]:
    """By diffusers' name of a tensor what a file adds to it in one expert.

    Raises:
        CheckpointError: a tensor of the file belongs to nothing, or has no partner.
    """
    shapes = transformer_tensors(spec.transformer)
    targets = _targets(tuple(shapes))
    multiplier = Multiplier.of(source)
    levels = levels_of(source)
    found: dict[str, dict[str, Any]] = {}
    factors: dict[str, float] = {}
    biases: dict[str, str] = {}
    for stored in source.stored:
        role = role_of(source, stored)
        prefix = PREFIX.match(stored)
        assert prefix is not None
        if levels[stored] not in (None, level):
            continue
        module = (role[0] if role else stored)[prefix.end() :]
        if spec.image is None and IMAGE_ENCODER.search(module):
            continue
        target = role and targets.get((module, "bias" if role[1] in ("bias", "up_bias") else "weight"))
        if role is None or target is None:
            raise CheckpointError(
                f"{shown(source.path)}: {shown(stored)} belongs to nothing in {shown(spec.folder)}, which has "
                f"{spec.layers} blocks of width {shapes['scale_shift_table'][-1]}: use a LoRA of this model."
            )
        part = {"bias": "diff", "up_bias": "diff", "modulation": "diff"}.get(role[1], role[1])
        parts = found.setdefault(target, {})
        if part in parts:
            raise CheckpointError(
                f"{shown(source.path)}: {shown(stored)} and {shown(parts[part])} are for the same tensor: use another "
                "file."
            )
        parts[part] = stored
        if part == "down":
            rank = (*source.stored[stored].shape, 0)[0]
            if rank < 1:
                raise CheckpointError(f"{shown(source.path)}: {shown(stored)} has no rows: download it again.")
            factors[module] = parts["factor"] = multiplier(module, rank)
        if role[1] == "up_bias":
            biases[module] = target
    for module, target in biases.items():  # PEFT's factor is of all that B gives
        found[target]["factor"] = factors.get(module, 1.0)
    for parts in found.values():
        if "alpha" in parts:
            parts["factor"] = 1.0  # in the factors
    deltas = {target: Delta(**parts) for target, parts in found.items()}
    for target, delta in deltas.items():
        _check_shapes(source, target, delta, shapes[target])
    return deltas


def levels_of(source: Source) -> dict[str, Level | None]:
    """By stored name the expert that a tensor is for; None where the name does not say so."""
    found = {name: match for name in source.stored if (match := PREFIX.match(name))}
    second_alone = {match["expert"] for match in found.values() if match["expert"]} == {"2"}
    unnumbered: Level | None = "high" if second_alone else None
    return {
        name: LEVELS[match["expert"]] if match["expert"] else unnumbered if match["first"] else None
        for name, match in found.items()
    }


@cache
def _targets(names: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """By a module as a LoRA may call it, and weight or bias there, the tensor. A table is a weight of its own."""
    block = {ours: theirs for theirs, ours in TRANSFORMER_BLOCK.items()}
    top = {ours: theirs for theirs, ours in TRANSFORMER.items()}
    targets = {}
    for name in names:
        module, leaf = (name, "weight") if name.endswith("_table") else name.rsplit(".", 1)
        found = re.fullmatch(r"(blocks\.\d+\.)(.+)", module)
        original = f"{found[1]}{block.get(found[2], found[2])}" if found else top.get(module, module)
        for spelled in (module, original):
            spellings = {spelled, spelled.removesuffix(".modulation")}  # as in blocks.0.diff_m
            for one in spellings | {one.replace(".", "_") for one in spellings}:
                targets[one, leaf] = name
    return targets


def _check_shapes(source: Source, target: str, delta: Delta, shape: tuple[int, ...]) -> None:
    stored = {name: source.stored[name].shape for name in delta.names}
    if (delta.down is None) != (delta.up is None) or (delta.alpha is not None and delta.down is None):
        raise CheckpointError(
            f"{shown(source.path)}: {shown(delta.names[0])} lacks its other factor: download it again."
        )
    fits = delta.diff is None or math.prod(stored[delta.diff]) == math.prod(shape)
    fits = fits and (delta.alpha is None or math.prod(stored[delta.alpha]) == 1)
    if delta.down is not None and delta.up is not None:
        down, up = stored[delta.down], stored[delta.up]
        fits = fits and min(len(down), len(up)) > 1 and down[0] == up[1]
        fits = fits and up[0] == shape[0] and math.prod(down[1:]) * math.prod(up[2:]) == math.prod(shape[1:])
        fits = fits and len(shape) > 1
    if not fits:
        sizes = [list(stored[name]) for name in delta.names]
        raise CheckpointError(
            f"{shown(source.path)}: {shown(delta.names[0])} has shapes {shown(sizes)} for {shown(target)} of "
            f"{shown(list(shape))}: use a LoRA of this model."
        )
