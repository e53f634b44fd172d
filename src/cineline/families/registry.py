"""The families that there are, found by the pipeline class that a checkpoint names (no torch)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from cineline.core.config import ModelFiles
from cineline.core.family import FamilySpec
from cineline.core.lora import Lora, LoraMode
from cineline.errors import CheckpointError, InvalidConfig, shown
from cineline.families.configs import read_json

SPECS: Mapping[str, str] = {
    "WanPipeline": "cineline.families.wan.spec:WanSpec",
    "WanImageToVideoPipeline": "cineline.families.wan.spec:WanSpec",
    "QwenImagePipeline": "cineline.families.qwen_image.spec:QwenImageSpec",
    "HunyuanVideo15Pipeline": "cineline.families.hunyuan_video.spec:HunyuanVideoSpec",
}
"""diffusers' pipeline class to "module:Class" of a `FamilySpec`, whose `open(folder, variant)` reads configs alone."""

KNOWN = tuple(f"cineline.families.{family}.known" for family in ("wan", "qwen_image", "hunyuan_video"))
"""Modules with models by their hub ids."""


def open_checkpoint(folder: Path, variant: str | None = None) -> FamilySpec:
    """The spec of a folder in diffusers format; no weights are read.

    Raises:
        CheckpointError: it is none, or of no family that there is.
    """
    if not (folder / "model_index.json").exists() and any(folder.glob("*.safetensors*")):
        raise CheckpointError(
            f"{shown(folder)} has weights and no model_index.json, as the original repositories do: use the model "
            "in diffusers format, whose name ends with -Diffusers, or give its files with --transformer and the like."
        )
    index = read_json(folder / "model_index.json", "a folder in diffusers format has it at its top")
    pipeline = str(index.get("_class_name"))
    if pipeline not in SPECS:
        raise CheckpointError(
            f"{shown(folder)} holds a {shown(pipeline)}: Cineline runs {', '.join(SPECS)} checkpoints."
        )
    module, name = SPECS[pipeline].split(":")
    spec: FamilySpec = getattr(importlib.import_module(module), name).open(folder, variant)
    return spec


def with_files(spec: FamilySpec | None, files: ModelFiles) -> FamilySpec:
    """The spec with weights from these files; without a model, of the one that the files are of.

    Raises:
        CheckpointError: a file is broken or of another model, or a component is nowhere.
        InvalidConfig: the model's family has no such files.
    """
    from cineline.families.wan.assemble import assembled  # late, as above
    from cineline.families.wan.spec import WanSpec

    if spec is not None and not isinstance(spec, WanSpec):
        raise InvalidConfig(f"{type(spec).__name__} takes no files={shown(files)}: leave them out.")
    return assembled(files, spec)


def with_loras(spec: FamilySpec, loras: Sequence[Lora], mode: LoraMode) -> FamilySpec:
    """The spec with these LoRAs, whose files are here.

    Raises:
        CheckpointError: a file is broken, no LoRA, or of another model. InvalidConfig: the model's family takes none,
            or two are called alike.
    """
    from cineline.families.wan import loras as wan  # late, as above
    from cineline.families.wan.spec import WanSpec

    if not isinstance(spec, WanSpec):
        raise InvalidConfig(f"{type(spec).__name__} takes no loras={shown(list(loras))}: leave them out.")
    return wan.with_loras(spec, loras, mode)


def known_model(name: str) -> FamilySpec | None:
    """The spec of a model that is known by its hub id, without any of its files; None for others."""
    for module in KNOWN:
        known: Mapping[str, FamilySpec] = importlib.import_module(module).KNOWN  # late: a checkpoint runs without
        if name in known:
            return known[name]
    return None
