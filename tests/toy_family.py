"""A second, tiny family: proof that the line knows nothing of Wan. `toy_reference.py` has it in one piece.

Two tensors travel over an edge, of different dtypes; the solver has a history. Legend: C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from cineline.channel import TensorSpec
from cineline.config import stages_alone
from cineline.denoise import combine
from cineline.models.pipeline_parallel import PipelineParallelMixin, RequestState, StagePart
from cineline.request import Branch, Job, VideoRequest

C = 3


@dataclass(frozen=True)
class ToySpec:
    layers: int = 8
    stages_class: ClassVar[str] = "toy_family:ToyStages"
    place = staticmethod(stages_alone)

    def resolve(self, request: VideoRequest, number: int) -> Job:
        steps, frames, scale = request.num_inference_steps or 4, request.num_frames or 5, request.guidance_scale or 1.0
        sizes = {"height": 1, "width": 1, "num_frames": frames, "steps": steps, "branches": 2 if scale > 1 else 1}
        rest = {"guidance_scale_2": None, "flow_shift": None, "boundary_ratio": None, "fps": 1, "has_image": False}
        given = request.model_dump(include={"prompt", "negative_prompt", "seed"})
        return Job(id=number, chunks=frames * request.decode, guidance_scale=scale, **given, **sizes, **rest)


def block(layer: int, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    weight = torch.sin(torch.arange(C * C, dtype=torch.float32) + layer).view(C, C)
    return torch.tanh(hidden @ weight + text)


def text_of(prompt: str) -> torch.Tensor:
    return torch.full((C,), sum(map(ord, prompt)) % 97 / 97)


def step_of(latents: torch.Tensor, prediction: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return latents - 0.3 * prediction + 0.1 * before


class ToyStages(PipelineParallelMixin[RequestState]):
    def __init__(self, spec: ToySpec) -> None:
        self.spec = spec

    def load(self, part: StagePart) -> int:
        self.part = part
        return 0  # bytes of weights

    def admit(self, job: Job, image: Image.Image | None) -> RequestState:
        noise = torch.randn(job.num_frames, C, generator=torch.Generator().manual_seed(job.seed))
        return RequestState(job, latents=noise)

    def encode(self, state: RequestState) -> Mapping[str, torch.Tensor]:
        return {"cond": text_of(state.job.prompt), "uncond": text_of(state.job.negative_prompt)}

    def conditioning_specs(self, state: RequestState) -> Mapping[str, TensorSpec]:
        return {name: TensorSpec((C,), torch.float32) for name in ("cond", "uncond")}

    def hidden_specs(self, state: RequestState) -> tuple[TensorSpec, ...]:
        return TensorSpec((state.job.num_frames, C), torch.float32), TensorSpec((1,), torch.int64)

    def latents_spec(self, state: RequestState) -> TensorSpec:
        return TensorSpec((state.job.num_frames, C), torch.float32)

    def embed(self, state: RequestState, step: int, branch: Branch) -> tuple[torch.Tensor, ...]:
        return state.latents + step, torch.zeros(1, dtype=torch.int64)

    def run_blocks(self, state, step, branch, hidden):
        states, count = hidden
        for layer in self.part.layers:
            states = block(layer, states, state.conditioning[branch.name.lower()])
        return states, count + len(self.part.layers)

    def predict(self, state, step, branch, hidden) -> torch.Tensor:
        assert hidden[1] == self.spec.layers
        return hidden[0]

    def advance(self, state: RequestState, step: int) -> torch.Tensor:
        prediction = combine(state.predictions, state.job.guidance_scale)
        state.latents = step_of(state.latents, prediction, getattr(state, "before", torch.zeros(())))
        state.before = prediction
        return state.latents

    def final_latents(self, state: RequestState) -> torch.Tensor:
        return state.latents.view(1, -1, C, 1)

    def decode(self, state: RequestState, chunk: int) -> np.ndarray:
        return (state.latents[chunk].view(1, 1, 1, C) * 40 + 128).clamp(0, 255).byte().numpy()
