"""A family whose blocks sleep: the real line at any number of stages, on a machine with few cores."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image

from cineline.core.config import Cut, DeviceConfig, ParallelConfig, stages_alone
from cineline.core.request import Branch, Job, VideoRequest
from cineline.errors import InvalidRequest
from cineline.families.pipeline_parallel import Hidden, PipelineParallelMixin, RequestState, StagePart
from cineline.families.wan.denoise import combine
from cineline.transport.channel import TensorSpec

LATENTS = TensorSpec((16, 6, 32, 32), torch.float32)
"""As large as those of `cineline bench line`: 0.4 MB."""


@dataclass(frozen=True)
class SleepingSpec:
    """A model of blocks that sleep.

    Attributes:
        layers: blocks.
        block_s: seconds that one block sleeps.
        hidden_bytes: of the hidden states that travel from stage to stage.
        high_steps: the first steps, which with split experts are the first one's.
        steps: of all requests, with split experts.
    """

    layers: int
    block_s: float
    hidden_bytes: int
    high_steps: int = 0
    steps: int = 1
    stages_class: ClassVar[str] = f"{__name__}:SleepingStages"

    def place(self, parallel: ParallelConfig) -> ParallelConfig:
        """See `FamilySpec.place`: its ranks know nothing of shared tokens or blocks."""
        if parallel.expert_placement == "split" and parallel.lanes == 1:
            return parallel.placed(self.layers, self.high_steps / self.steps)
        return stages_alone(parallel)

    def cut(self, parallel: ParallelConfig, config: DeviceConfig) -> tuple[Cut, ...]:
        """See `FamilySpec.cut`."""
        return parallel.cut(self.layers)

    def resolve(self, request: VideoRequest, number: int) -> Job:
        """See `FamilySpec.resolve`; steps and guidance are all that counts here."""
        if request.num_inference_steps is None or request.guidance_scale is None:
            raise InvalidRequest("A sleeping model has no defaults: give num_inference_steps and guidance_scale.")
        return Job(
            id=number,
            prompt=request.prompt,
            negative_prompt="",
            height=1,
            width=1,
            num_frames=1,
            steps=request.num_inference_steps,
            branches=2 if request.guidance_scale > 1 else 1,
            texts=0,
            chunks=0,
            guidance_scale=request.guidance_scale,
            guidance_scale_2=None,
            flow_shift=None,
            boundary_ratio=None,
            seed=request.seed,
            fps=1,
            has_image=False,
        )


class SleepingStages(PipelineParallelMixin[RequestState]):
    """One stage of it. What travels is made once and never written to."""

    def __init__(self, spec: SleepingSpec) -> None:
        self._spec = spec

    def load(self, part: StagePart) -> int:
        self._sleep_s = self._spec.block_s * len(part.cut.blocks)
        self._hidden = torch.zeros(self._spec.hidden_bytes, dtype=torch.uint8)
        return 0

    def admit(self, job: Job, image: Image.Image | None) -> RequestState:
        return RequestState(job, latents=torch.zeros(LATENTS.shape))

    def encode(self, state: RequestState) -> Mapping[str, torch.Tensor]:
        return {}

    def conditioning_specs(self, state: RequestState) -> Mapping[str, TensorSpec]:
        return {}

    def hidden_specs(self, state: RequestState) -> tuple[TensorSpec, ...]:
        return (TensorSpec((self._spec.hidden_bytes,), torch.uint8),)

    def latents_spec(self, state: RequestState) -> TensorSpec:
        return LATENTS

    def expert(self, state: RequestState, step: int) -> int:
        return int(step >= self._spec.high_steps > 0)

    def history_specs(self, state: RequestState) -> tuple[TensorSpec, ...]:
        return (LATENTS,)

    def history(self, state: RequestState) -> Sequence[torch.Tensor]:
        return ()

    def take_history(self, state: RequestState, tensors: Sequence[torch.Tensor]) -> None:
        state.latents = tensors[0].clone()

    def embed(self, state: RequestState, step: int, branch: Branch) -> Hidden:
        return (self._hidden,)

    def run_blocks(self, state: RequestState, step: int, branch: Branch, hidden: Hidden) -> Hidden:
        time.sleep(self._sleep_s)
        return (self._hidden,)

    def predict(self, state: RequestState, step: int, branch: Branch, hidden: Hidden) -> torch.Tensor:
        return torch.zeros(LATENTS.shape)

    def advance(self, state: RequestState, step: int) -> torch.Tensor:
        state.latents = combine(state.predictions, state.job.guidance_scale)
        return state.latents

    def final_latents(self, state: RequestState) -> torch.Tensor:
        assert state.latents is not None
        return state.latents

    def decode(self, state: RequestState, chunk: int, hidden: Hidden) -> Hidden:
        raise NotImplementedError("a sleeping model has no frames: ask with decode=False")
