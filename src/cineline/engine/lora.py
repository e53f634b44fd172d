"""From what a user calls a LoRA to a model's spec that has it: a file, a folder, or a hub id that is downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from cineline.core.family import FamilySpec
from cineline.core.lora import MAIN, WEIGHTS, Lora, LoraMode
from cineline.engine.hub import download
from cineline.errors import CheckpointError, InvalidConfig, shown
from cineline.families.registry import with_loras
from cineline.weights.layout import SUFFIX

ON_HUB = re.compile(r"(?P<id>[\w-][\w.-]*/[\w.-]+)(?:/(?P<inside>.+))?")
"""A hub id, and perhaps a file or folder in it."""

MOST = 2
"""Files of one LoRA: one for each of two experts."""

BESIDE = "adapter_config.json"
"""What PEFT's files need."""


def add_loras(spec: FamilySpec, loras: Sequence[str | Path], mode: LoraMode) -> FamilySpec:
    """The spec with these LoRAs, downloading those that are on the hub.

    Raises:
        CheckpointError: there is no such LoRA, it cannot be read, or is of another model.
        InvalidConfig: it is written in another way, or the mode is none.
    """
    if mode not in get_args(LoraMode):
        raise InvalidConfig(f"lora_mode={shown(mode)} is not known: use {' or '.join(get_args(LoraMode))}.")
    if isinstance(loras, str | Path):
        raise InvalidConfig(f"loras={shown(loras)} is one text: give a list of them.")
    for lora in loras:
        if not isinstance(lora, str | Path):
            raise InvalidConfig(f"loras: {shown(lora)} is no text: write [NAME=][high:|low:]FILE[@SCALE].")
    given = [Lora.of(str(lora)) for lora in loras]
    if not given and mode == "merge":
        return spec
    return with_loras(spec, [replace(lora, path=_here(lora.path)) for lora in given], mode)


def _here(path: Path) -> Path:
    """Where it is on this machine."""
    if path.exists():
        return path
    found = ON_HUB.fullmatch(path.as_posix())
    if found is None or path.is_absolute():
        raise CheckpointError(f"LoRA {shown(path)} does not exist: give a file, a folder, or a hub id.")
    hub_id, inside = found["id"], found["inside"] or ""
    if Path(path.parts[0]).is_dir():
        raise CheckpointError(
            f"LoRA {shown(path)} does not exist in {shown(path.parts[0])}, which is a folder here: check the path; for "
            "a hub id of that name use another current folder."
        )
    if inside.lower().endswith(WEIGHTS):
        folder = f"{Path(inside).parent.as_posix()}/".removeprefix("./")
        patterns, ignored = [inside, f"{folder}{BESIDE}"], None
    else:
        folder = f"{inside}/" if inside else ""
        patterns, ignored = [f"{folder}*{SUFFIX}", f"{folder}{BESIDE}"], [f"{folder}*/*"]
        patterns = [f"{folder}{name}" for name in _main(path, hub_id, patterns, ignored)] or patterns
    here = Path(download(hub_id, "lora", allow_patterns=patterns, ignore_patterns=ignored)) / inside
    if not here.exists():
        raise CheckpointError(f"LoRA {shown(path)} is not in {shown(hub_id)} on the hub: check the path.")
    return here


def _main(path: Path, hub_id: str, patterns: list[str], ignored: list[str]) -> list[str]:
    """What to take of a folder that holds more than a LoRA; one that holds many is refused before they are downloaded.
    Where the hub cannot be asked, there may be a copy here."""
    try:
        files = download(hub_id, "lora", allow_patterns=patterns, ignore_patterns=ignored, dry_run=True)
    except CheckpointError:
        return []
    names = sorted(Path(file.filename).name for file in files if file.filename.endswith(SUFFIX))
    if main := [name for name in MAIN if name in names][:1]:
        return [*main, BESIDE]
    if len(names) > MOST:
        raise CheckpointError(
            f"LoRA {shown(path)} holds {len(names)} files, such as {shown(names[:3])}: give one of them, by its path."
        )
    return []
