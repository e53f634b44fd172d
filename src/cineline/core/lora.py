"""LoRAs as a user gives them to an engine, and names them in a request."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cineline.errors import InvalidConfig, InvalidRequest, shown

LoraMode = Literal["merge", "runtime"]
"""merge: added to the weights as they are read, for all requests. runtime: kept beside them, for requests to choose."""

Level = Literal["high", "low"]
"""Of the noise that an expert is for."""

GIVEN = re.compile(r"(?:(?P<name>[\w.-]+)=)?(?:(?P<level>high|low):)?(?P<path>.+?)(?:@(?P<scale>[^@/]*))?", re.DOTALL)

WEIGHTS = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
"""Endings of files that are no part of a name."""


@dataclass(frozen=True)
class Lora:
    """One of an engine's LoRAs.

    Attributes:
        path: a file, a folder, or a hub id with a path in it after that.
        scale: of what it adds.
        level: of the one expert that it is for; None for all experts.
        name: what requests call it. Left out, it is the file's or folder's name without its ending.

    Raises:
        InvalidConfig: the scale is not finite, or the name cannot be written in a request.
    """

    path: Path
    scale: float = 1.0
    level: Level | None = None
    name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "name", self.name or _stem(self.path))
        if not math.isfinite(self.scale):
            raise InvalidConfig(f"LoRA {shown(self.name)}: scale {shown(self.scale)} is not finite: use 1, or 0 to 2.")
        if self.level not in (None, *get_args(Level)):
            raise InvalidConfig(f"LoRA {shown(self.name)}: level {shown(self.level)} is not known: use high or low.")
        if "@" in self.name:
            raise InvalidConfig(f"LoRA {shown(self.name)} has an @ in its name: give it another one, as NAME=FILE.")

    @classmethod
    def of(cls, text: str) -> Lora:
        """From `[NAME=][high:|low:]FILE[@SCALE]`. A file whose own name looks so is written with its folder, as ./a=b.

        Raises:
            InvalidConfig: there is no file in it, or the scale is no finite number.
        """
        found = GIVEN.fullmatch(text)
        if found is None:
            raise InvalidConfig(f"lora={shown(text)} names no file: write [NAME=][high:|low:]FILE[@SCALE].")
        level: Level | None = None if found["level"] is None else ("high" if found["level"] == "high" else "low")
        scale = 1.0 if found["scale"] is None else _number(found["scale"])
        if not math.isfinite(scale):
            raise InvalidConfig(
                f"lora={shown(text)}: the scale {shown(found['scale'])} is no finite number: write FILE@0.8."
            )
        return cls(Path(found["path"]), scale, level, found["name"] or "")


def choice(
    loras: Sequence[Lora], mode: LoraMode, asked: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[float, ...]] | None:
    """The LoRAs that a request is to have, in its order, and what each one's own scale is multiplied by.

    Args:
        loras, mode: the engine's.
        asked: each as NAME or NAME@SCALE; None for all that there are.

    Returns: None where they are in the weights.

    Raises:
        InvalidRequest: there is no such LoRA, a scale is no finite number, or requests cannot choose.
    """
    if mode == "merge":
        if asked is not None:
            raise InvalidRequest(
                f"loras={shown(list(asked))} needs an engine that keeps its LoRAs apart: give that "
                "lora_mode='runtime', or leave the field out."
            )
        return None
    names = list(dict.fromkeys(lora.name for lora in loras))
    scales: dict[str, float] = {}
    for text in names if asked is None else asked:
        name, at, scale = text.partition("@")
        if name not in names:
            raise InvalidRequest(
                f"loras: {shown(name)} is not there: name one of the engine's, {shown(sorted(names))}, or give it to "
                "the engine with --lora."
            )
        if name in scales:
            raise InvalidRequest(f"loras: {shown(name)} is named twice: name it once, with the scale that you want.")
        scales[name] = _number(scale) if at else 1.0
        if not math.isfinite(scales[name]):
            raise InvalidRequest(f"loras: {shown(text)} has no finite number behind the @: write NAME@0.8.")
    return tuple(scales), tuple(scales.values())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in WEIGHTS else path.name
