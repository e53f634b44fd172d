"""What a model family promises of its models before any rank runs (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cineline.core.config import Cut, DeviceConfig, Dtype, ParallelConfig
from cineline.core.costs import Costs, LineCosts
from cineline.core.hardware import Device, Link
from cineline.core.lora import Lora, LoraMode
from cineline.core.request import Job, VideoRequest
from cineline.errors import InvalidConfig


class FamilySpec(Protocol):
    """What the engine must know of a model before any rank runs; a dataclass of plain values (`core.codec`), no torch.

    Attributes:
        stages_class: "module:Class" of the family's `PipelineParallelMixin`, imported by the ranks.
    """

    @property
    def stages_class(self) -> str: ...

    def place(self, parallel: ParallelConfig) -> ParallelConfig:
        """The config with nothing left open.

        Raises:
            InvalidConfig: this model cannot be divided that way.
        """
        ...

    def cut(self, parallel: ParallelConfig, config: DeviceConfig) -> tuple[Cut, ...]:
        """What each stage holds, for a config that `place` has returned; `config` says how large the weights are.

        Raises:
            InvalidConfig: more stages than blocks, or a split that does not add up.
        """
        ...

    def resolve(self, request: VideoRequest, number: int) -> Job:
        """The request with nothing left open, as job `number`.

        Raises:
            InvalidRequest: a field breaks one of the model's rules.
        """
        ...


@runtime_checkable
class StoredFamily(FamilySpec, Protocol):
    """A family whose models are checkpoints in diffusers format.

    Attributes:
        folder: the checkpoint's; it names the model.
        variant: of its weights, such as fp16; None for the plain ones.
        files: by component, the file that its weights come from instead.
        loras: that it is given, in their order. lora_mode: whether they are in its weights.
    """

    @property
    def folder(self) -> Path: ...
    @property
    def variant(self) -> str | None: ...
    @property
    def files(self) -> Mapping[str, Path]: ...
    @property
    def loras(self) -> tuple[Lora, ...]: ...
    @property
    def lora_mode(self) -> LoraMode: ...


@runtime_checkable
class PromptedFamily(FamilySpec, Protocol):
    """A family whose heads keep prompts' embeddings, as `Job.prompts` says."""

    def prompt_bytes(self, dtype: Dtype) -> int:
        """Of one embedding."""
        ...


@runtime_checkable
class GriddedFamily(FamilySpec, Protocol):
    """A family whose videos have sizes on a grid.

    Attributes:
        grid: height and width are multiples of these. vae_frames: so many come together, behind the first one.
    """

    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def vae_frames(self) -> int: ...


@runtime_checkable
class PlannedFamily(FamilySpec, Protocol):
    """A family that says what its models cost, so that the planner can divide them.

    Attributes:
        folder: the checkpoint's; it names the model.
        model_options: what a command line calls it.
    """

    @property
    def folder(self) -> Path: ...
    @property
    def model_options(self) -> str: ...

    def example(self, fields: Mapping[str, Any]) -> VideoRequest:
        """A request with these fields, the model's defaults for the others, and an image where it needs one."""
        ...

    def costs(self, dtype: Dtype, vae_dtype: Dtype) -> Costs:
        """Of the model's parts, in these dtypes."""
        ...

    def line(
        self,
        parallel: ParallelConfig,
        devices: Sequence[Device],
        link: Link,
        job: Job,
        dtype: Dtype = "float32",
        vae_dtype: Dtype = "float32",
    ) -> LineCosts:
        """A division that `place` has returned, on a device a stage and one link between them all."""
        ...


def plannable(spec: FamilySpec) -> PlannedFamily:
    """The spec of a family that can be planned for.

    Raises:
        InvalidConfig: the family does not say what its models cost.
    """
    if not isinstance(spec, PlannedFamily):
        raise InvalidConfig(
            f"{type(spec).__name__} does not say what its models cost, so that nothing can be planned for them: "
            "give a ParallelConfig."
        )
    return spec
