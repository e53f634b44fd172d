"""A second, tiny family: proof that the line knows nothing of Wan. `toy_reference.py` has it in one piece. Legend: C
channels. Two tensors travel with a forward; the solver has a history; text encoder and decoder are cut too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar

import torch
import toy_arithmetic as toy

from cineline.core.config import Cut, DeviceConfig, ParallelConfig, stages_alone
from cineline.core.image import KeyFrames
from cineline.core.request import Job, Kind, VideoRequest, WorkItem
from cineline.families import snapshot
from cineline.families.guidance import combine
from cineline.families.pipeline_parallel import PipelineParallelMixin, RequestState, StagePart
from cineline.schedule.words import Value
from cineline.transport.channel import TensorSpec


@dataclass(frozen=True)
class ToySpec:
    layers: int = 8
    stages_class: ClassVar[str] = "toy_family:ToyStages"
    place = staticmethod(stages_alone)

    def cut(self, parallel: ParallelConfig, config: DeviceConfig) -> tuple[Cut, ...]:
        return parallel.cut(self.layers, toy.TEXT_LAYERS, toy.DECODER_UNITS)

    def resolve(self, request: VideoRequest, number: int) -> Job:
        steps, frames, scale = request.num_inference_steps or 4, request.num_frames or 5, request.guidance_scale or 1.0
        given = request.model_dump(include={"prompt", "negative_prompt", "seed"})
        given |= dict.fromkeys(("height", "width", "fps"), 1) | dict.fromkeys(("branches", "texts"), 1 + (scale > 1))
        given |= {"num_frames": frames, "chunks": frames * request.decode, "steps": steps, "guidance_scale": scale}
        return Job(id=number, has_image=False, unguided=(1,) * request.skip_guidance_at_one, **given)


@dataclass
class ToyState(RequestState):
    latents: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    before: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


class ToyStages(PipelineParallelMixin[ToyState]):
    def load(self, part: StagePart) -> int:
        self.part = part
        return 0  # bytes of weights

    def admit(self, job: Job, image: KeyFrames | None) -> ToyState:
        return ToyState(job, latents=torch.randn(job.num_frames, toy.C, generator=toy.seeded(job.seed)))

    def specs(self, state: ToyState, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        one, all_frames = TensorSpec((toy.C,), torch.float32), TensorSpec((state.job.num_frames, toy.C), torch.float32)
        several: dict[Value, tuple[TensorSpec, ...]] = {Value.HIDDEN: (all_frames, TensorSpec((1,), torch.int64))}
        several[Value.HISTORY] = (snapshot.spec_of(2 * all_frames.nbytes),)
        several[Value.CONDITIONING] = (one,) * len(self.part.branches(state.job))
        return several.get(value, (all_frames if value in (Value.PREDICTION, Value.LATENTS) else one,))

    def compute(self, state: ToyState, item: WorkItem, starts: bool, ends: bool) -> None:
        came, job, branch = state.take_hidden(), state.job, item.branch
        if item.kind is Kind.TEXT:
            (text,) = came or (toy.text_of((job.prompt, job.negative_prompt)[branch]),)
            state.hidden = (reduce(toy.text_layer, self.part.cut.text, text),)
        elif item.kind is Kind.ENCODE and starts:
            state.conditioning = tuple(state.texts[branch].clone() for branch in self.part.branches(job))
        elif item.kind is Kind.DENOISE:
            states, count = came or (state.latents + item.number, torch.zeros(1, dtype=torch.int64))
            text = state.conditioning[self.part.branches(job).index(branch)]
            state.hidden = self.run_blocks(state, item.number, states, text), count + len(self.part.cut.blocks)
            if ends:
                state.predictions[branch], count = state.take_hidden()
                assert count == self.spec.layers
        elif item.kind is Kind.DECODE:
            (pixel,) = came or (state.latents[item.number],)
            pixel = reduce(toy.decoder_unit, self.part.cut.decoder, pixel)
            state.hidden = (toy.quantise(pixel) if ends else pixel,)

    def run_blocks(self, state: ToyState, step: int, states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return reduce(lambda hidden, layer: toy.block(layer, hidden, text), self.part.cut.blocks, states)

    def finish(self, state: ToyState, item: WorkItem) -> None:
        prediction = combine(state.predictions, state.job.guidance_scale)
        state.latents, state.before = toy.step_of(state.latents, prediction, state.before), prediction
        state.predictions.clear()

    def answer(self, state: ToyState, item: WorkItem) -> torch.Tensor | None:
        if item.kind is Kind.DECODE:
            return state.take_hidden()[0]
        return state.latents.view(1, -1, toy.C, 1) if state.job.ends_denoising(item) else None

    def export(self, state: ToyState) -> dict[str, Any]:
        return {"latents": state.latents.clone(), "before": state.before.clone()}

    def restore(self, state: ToyState, exported: Mapping[str, Any]) -> None:
        state.latents, state.before = exported["latents"], exported["before"]
