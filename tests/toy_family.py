"""A second, tiny family: proof that the line knows nothing of Wan. `toy_reference.py` has it in one piece. Legend: C
channels. Two tensors travel with a forward; the solver has a history; text encoder and decoder are cut too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
import toy_arithmetic as toy
from toy_arithmetic import C

from cineline.core.config import Cut, DeviceConfig, ParallelConfig, stages_alone
from cineline.core.request import Branch, Job, VideoRequest
from cineline.families.pipeline_parallel import Hidden, PipelineParallelMixin, RequestState, StagePart
from cineline.families.wan.denoise import combine
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
        return Job(id=number, guidance_scale_2=None, flow_shift=None, boundary_ratio=None, has_image=False, **given)


class ToyState(RequestState):
    latents: torch.Tensor
    before = torch.zeros(())


@dataclass(eq=False)
class ToyStages(PipelineParallelMixin[ToyState]):
    spec: ToySpec

    def load(self, part: StagePart) -> int:
        self.part = part
        return 0  # bytes of weights

    def admit(self, job: Job, image: object) -> ToyState:
        return ToyState(job, latents=torch.randn(job.num_frames, C, generator=toy.seeded(job.seed)))

    def embedding_spec(self, state: ToyState) -> TensorSpec:
        return TensorSpec((C,), torch.float32)

    def encode_text(self, state: ToyState, branch: Branch, hidden: Hidden) -> Hidden:
        (text,) = hidden or (toy.text_of(state.job.prompt if branch is Branch.COND else state.job.negative_prompt),)
        return (reduce(toy.text_layer, self.part.cut.text, text),)

    def encode(self, state: ToyState) -> dict[str, torch.Tensor]:
        return {branch.name: text.clone() for branch, text in state.texts.items()}

    def conditioning_specs(self, state: ToyState) -> dict[str, TensorSpec]:
        return {branch.name: TensorSpec((C,), torch.float32) for branch in self.part.branches(state.job)}

    def hidden_specs(self, state: ToyState) -> tuple[TensorSpec, ...]:
        return TensorSpec((state.job.num_frames, C), torch.float32), TensorSpec((1,), torch.int64)

    def latents_spec(self, state: ToyState) -> TensorSpec:
        return TensorSpec((state.job.num_frames, C), torch.float32)

    def embed(self, state: ToyState, step: int, branch: Branch) -> tuple[torch.Tensor, ...]:
        return state.latents + step, torch.zeros(1, dtype=torch.int64)

    def run_blocks(self, state: ToyState, step: int, branch: Branch, hidden: Hidden) -> Hidden:
        states, count = hidden
        for layer in self.part.cut.blocks:
            states = toy.block(layer, states, state.conditioning[branch.name])
        return states, count + len(self.part.cut.blocks)

    def predict(self, state: ToyState, step: int, branch: Branch, hidden: Hidden) -> torch.Tensor:
        assert hidden[1] == self.spec.layers
        return hidden[0]

    def advance(self, state: ToyState, step: int) -> torch.Tensor:
        prediction = combine(state.predictions, state.job.guidance_scale)
        state.latents, state.before = toy.step_of(state.latents, prediction, state.before), prediction
        return state.latents

    def final_latents(self, state: ToyState) -> torch.Tensor:
        return state.latents.view(1, -1, C, 1)

    def decode_specs(self, state: ToyState, chunk: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec((C,), torch.float32),)

    def decode(self, state: ToyState, chunk: int, hidden: Hidden) -> Hidden:
        pixel = reduce(toy.decoder_unit, self.part.cut.decoder, hidden[0] if hidden else state.latents[chunk])
        return (toy.quantise(pixel),) if self.part.is_tail else (pixel,)
