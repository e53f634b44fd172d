"""What a model family promises of its models before any rank runs (no torch)."""

from __future__ import annotations

from typing import Protocol

from cineline.core.config import Cut, DeviceConfig, ParallelConfig
from cineline.core.request import Job, VideoRequest


class FamilySpec(Protocol):
    """What the engine must know of a model before any rank runs; picklable, no torch.

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
