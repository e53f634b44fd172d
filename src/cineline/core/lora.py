"""LoRAs as a user gives them to an engine, and names them in a request."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cineline.errors import InvalidConfig, InvalidRequest, shown

LoraMode = Literal["merge", "runtime"]
"""merge: added to the weights as they are read, for all requests. runtime: kept beside them, for requests to choose."""

Level = Literal["high", "low"]
"""Of the noise that an expert is for."""

GIVEN = re.compile(r"(?:(?P<name>[^=/@:]+)=)?(?:(?P<level>high|low):)?(?P<path>.+?)(?:@(?P<scale>[^@/]*))?", re.DOTALL)

WEIGHTS = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
"""Endings of files that are no part of a name."""


MAIN = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What PEFT and diffusers call the file in a LoRA's folder."""


@dataclass(frozen=True)
class Lora:
    """One of an engine's LoRAs.

    Attributes:
        path: a file, a folder, or a hub id with a path in it after that.
        scale: of what it adds.
        level: of the one expert that it is for; None for all experts.
        name: what requests call it.
    """

    path: Path
    scale: float
    level: Level | None
    name: str

    @classmethod
    def of(cls, text: str) -> Lora:
        """From `[NAME=][high:|low:]FILE[@SCALE]`; the name is else that of the file or folder, without its ending.

        A file whose own name looks like that is written with its folder and a scale, as NAME=./a=b@c@1.

        Raises:
            InvalidConfig: there is no file in it, or the scale is no finite number.
        """
        found = GIVEN.fullmatch(text)
        if found is None:
            raise InvalidConfig(f"lora={shown(text)} names no file: write [NAME=][high:|low:]FILE[@SCALE].")
        path = Path(found["path"])
        own = path if path.name.strip(".") else path.resolve()
        name = found["name"] or (own.stem if own.suffix.lower() in WEIGHTS else own.name)
        if not name or set("=/@:") & set(name):
            raise InvalidConfig(
                f"lora={shown(text)} is called {shown(name)}, and names have none of = / @ and :, write NAME=FILE."
            )
        scale = 1.0 if found["scale"] is None else _number(found["scale"])
        if not math.isfinite(scale):
            raise InvalidConfig(
                f"lora={shown(text)}: the scale {shown(found['scale'])} is no finite number: write FILE@0.8."
            )
        level: Mapping[str | None, Level] = {"high": "high", "low": "low"}
        return cls(path, scale, level.get(found["level"]), name)

    @property
    def text(self) -> str:
        """As `of` reads it, wherever it is read."""
        return self.told(str(self.path.absolute()))

    def told(self, path: str, named: bool = True) -> str:
        """The same, with another path, and perhaps without its name."""
        level = "" if self.level is None else f"{self.level}:"
        return f"{f'{self.name}=' if named else ''}{level}{path}@{self.scale!r}"


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
