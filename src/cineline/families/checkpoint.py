"""A checkpoint in diffusers format, of a family that takes it as it is and has one stack of blocks (no torch)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar

from cineline.core.config import Cut, DeviceConfig, Dtype, ParallelConfig
from cineline.core.hardware import Device, Link
from cineline.core.lora import Lora, LoraMode
from cineline.core.request import IMAGES, Job, VideoRequest
from cineline.errors import CheckpointError, InvalidRequest, shown
from cineline.families.configs import read_json
from cineline.families.stack import StackCosts, StackLine
from cineline.planning.cut import default_cut

DEFAULTS_FILE = "cineline.json"

NO_MODELS = ("scheduler", "guider")
"""Components without weights, whose configs have names of their own."""

NO_DEFAULTS = ("prompt", "decode", "loras", *IMAGES, "preset", "num_videos", "fit", "preview", "cache")
"""Request fields that cannot have a default."""


@dataclass(frozen=True)
class Checkpoint(ABC):
    """What `StoredFamily` asks for, where there are no files beside the folder and no LoRAs, and `PlannedFamily`.

    Attributes:
        folder: holds `model_index.json` and a folder for each component.
        configs: of the components, by name. defaults: of requests.
        variant: of the weights; None for the plain ones.
    """

    folder: Path
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    variant: str | None = None

    line_class: ClassVar[type[StackLine]]
    """What items cost on one division."""

    @abstractmethod
    def costs(self, dtype: Dtype, vae_dtype: Dtype) -> StackCosts:
        """See `PlannedFamily.costs`."""

    def cut(self, parallel: ParallelConfig, config: DeviceConfig) -> tuple[Cut, ...]:
        """See `FamilySpec.cut`."""
        costs = self.costs(config.dtype, config.vae_dtype)
        return default_cut(costs, parallel).cut(costs.blocks, costs.text_layers, len(costs.decoder_bytes))

    def line(
        self,
        parallel: ParallelConfig,
        devices: Sequence[Device],
        link: Link,
        job: Job,
        dtype: Dtype = "float32",
        vae_dtype: Dtype = "float32",
    ) -> StackLine:
        """See `PlannedFamily.line`."""
        return self.line_class(self, self.costs(dtype, vae_dtype), parallel, tuple(devices), link, job)

    def example(self, fields: Mapping[str, Any]) -> VideoRequest:
        """See `PlannedFamily.example`."""
        return VideoRequest(prompt="an example", **fields)

    @property
    def files(self) -> Mapping[str, Path]:
        return {}

    @property
    def loras(self) -> tuple[Lora, ...]:
        return ()

    @property
    def lora_mode(self) -> LoraMode:
        return "merge"

    @property
    def model_options(self) -> str:
        """What a command line calls the model."""
        return f"--model {quote(str(self.folder))}"


def read_configs(folder: Path, classes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The configs of a folder's components, whose classes must be these.

    Raises:
        CheckpointError: one is missing, or of another class.
    """
    index = read_json(folder / "model_index.json", "a folder in diffusers format has it at its top")
    configs = {}
    for name, wanted in classes.items():
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if found != wanted:
            raise CheckpointError(
                f"{shown(folder / 'model_index.json')}: {name} is a {shown(found)}, and it must be a {wanted}: use a "
                "whole checkpoint of that model."
            )
        file = f"{name}_config.json" if name in NO_MODELS else "config.json"
        configs[name] = read_json(folder / name / file, "each component has one")
    return configs


def check_plain(folder: Path, config: Mapping[str, Any], unsupported: Mapping[str, str]) -> None:
    """Refuse what a component's config has switched on.

    Args:
        unsupported: what each key's truth would mean.

    Raises:
        CheckpointError: one of them is true.
    """
    for name, meaning in unsupported.items():
        if config.get(name):
            raise CheckpointError(f"{shown(folder)}: {name}={shown(config[name])} is {meaning}, which is not run here.")


def own_defaults(folder: Path) -> dict[str, Any]:
    """Default request fields from a `cineline.json` beside the model's index, if there is one.

    Raises:
        CheckpointError: a field is unknown, of the wrong type, or cannot have a default.
    """
    path = folder / DEFAULTS_FILE
    if not path.exists():
        return {}
    own = read_json(path, "it holds default request fields")
    try:
        checked = VideoRequest(**{"prompt": "checked"} | own)
    except InvalidRequest as error:
        raise CheckpointError(f"{shown(path)}: {error}") from None
    useless = [name for name in own if name in NO_DEFAULTS or own[name] is None]
    if useless:
        raise CheckpointError(
            f"{shown(path)}: {shown(useless[0])} cannot have the default {shown(own[useless[0]])}: remove it."
        )
    return checked.model_dump(include=set(own))
