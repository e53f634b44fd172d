"""A family whose blocks sleep: the real line at any number of stages, on a machine with few cores."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cineline.core.config import Cut, DeviceConfig, ParallelConfig, stages_alone
from cineline.core.image import KeyFrames
from cineline.core.request import Job, Kind, VideoRequest, WorkItem, drawn
from cineline.errors import InvalidRequest
from cineline.families import snapshot
from cineline.families.guidance import combine
from cineline.families.pipeline_parallel import PipelineParallelMixin, RequestState, StagePart
from cineline.schedule.words import Value
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
        skip_share: of all steps, those that are skipped, none among the first fifth; they take no time.
    """

    layers: int
    block_s: float
    hidden_bytes: int
    high_steps: int = 0
    steps: int = 1
    skip_share: float = 0.0
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
            seed=drawn(request.seed),
            fps=1,
            has_image=False,
            skipped=self.skipped(request.num_inference_steps),
        )

    def skipped(self, steps: int) -> tuple[int, ...]:
        """Evenly spread, as many as may be up to the share."""
        free = [step for step in range(max(1, steps // 5), steps) if step != self.high_steps]
        wanted = min(round(self.skip_share * steps), len(free))
        return tuple(step for at, step in enumerate(free) if (at + 1) * wanted // len(free) > at * wanted // len(free))


class SleepingStages(PipelineParallelMixin[RequestState]):
    """One stage of it. What travels is made once and never written to."""

    def load(self, part: StagePart) -> int:
        self._blocks = len(part.cut.blocks)
        self._hidden = torch.zeros(self.spec.hidden_bytes, dtype=torch.uint8)
        return 0

    def admit(self, job: Job, image: KeyFrames | None) -> RequestState:
        return RequestState(job, latents=torch.zeros(LATENTS.shape))

    def expert(self, state: RequestState, step: int) -> int:
        return int(step >= self.spec.high_steps > 0)

    def specs(self, state: RequestState, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        if value is Value.CONDITIONING:
            return ()
        if value is Value.HISTORY:
            return (snapshot.spec_of(LATENTS.nbytes),)
        return (TensorSpec((self.spec.hidden_bytes,), torch.uint8),) if value is Value.HIDDEN else (LATENTS,)

    def compute(self, state: RequestState, item: WorkItem, starts: bool, ends: bool) -> None:
        if item.kind is Kind.DENOISE:
            # One by one: what a sleep is too long is then the same however blocks are cut.
            for _ in range(0 if item.number in state.job.skipped else self._blocks):
                time.sleep(self.spec.block_s)
            state.hidden = () if ends else (self._hidden,)
        if item.kind is Kind.DENOISE and ends:
            state.predictions[item.branch] = torch.zeros(LATENTS.shape)

    def finish(self, state: RequestState, item: WorkItem) -> None:
        state.latents = combine(state.predictions, state.job.guidance_scale)
        state.predictions.clear()

    def answer(self, state: RequestState, item: WorkItem) -> torch.Tensor | None:
        return state.latents if state.job.ends_denoising(item) else None

    def export(self, state: RequestState) -> Mapping[str, Any]:
        return {"latents": state.latents}

    def restore(self, state: RequestState, exported: Mapping[str, Any]) -> None:
        state.latents = exported["latents"]
