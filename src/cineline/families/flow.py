"""Families of one expert that diffusers' Euler solver steps along a flow: what they have alike.

Legend: S tokens of the latents, D model width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from cineline.core.image import KeyFrames
from cineline.core.request import Branch, Job, Kind, WorkItem
from cineline.families import snapshot
from cineline.families.pipeline_parallel import PipelineParallelMixin, RequestState, StagePart
from cineline.families.snapshot import copied
from cineline.families.solver import contents, export_solver, restore_solver
from cineline.schedule.words import Value
from cineline.transport.channel import TensorSpec


@dataclass
class FlowState(RequestState):
    """One request on one stage.

    Attributes:
        latent_spec: of the latents as they are stepped.
        solver: on head and tail, diffusers' scheduler; the tail's steps. fresh: what it had before the first step.
        names: of the conditioning's tensors, in their order.
        rotary: by branch, what blocks turn queries and keys by.
        decoding: the decode under way.
    """

    latent_spec: TensorSpec = field(default_factory=lambda: TensorSpec((), torch.float32))
    solver: Any = None
    fresh: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    rotary: dict[Branch, Any] = field(default_factory=dict)
    decoding: Any = None

    def conditioned(self, name: str) -> Tensor:
        """A tensor of the conditioning."""
        return self.conditioning[self.names.index(name)]

    def prompt(self, branch: Branch) -> str:
        """The branch's."""
        return self.job.prompt if branch is Branch.COND else self.job.negative_prompt


class FlowStages(PipelineParallelMixin[FlowState]):
    """One stage of such a model. A family says what its parts are and what they make."""

    state_class: ClassVar[type[FlowState]] = FlowState

    _part: StagePart
    _dtype: torch.dtype

    @abstractmethod
    def solver(self, job: Job) -> FlowMatchEulerDiscreteScheduler:
        """The checkpoint's scheduler with the job's timesteps."""

    @abstractmethod
    def noise(self, job: Job) -> Tensor:
        """What diffusers' pipeline draws from the job's seed, on the CPU, in the form that is stepped."""

    @abstractmethod
    def latent_spec(self, job: Job) -> TensorSpec:
        """Of that."""

    @abstractmethod
    def rotary(self, job: Job, branch: Branch) -> Any:
        """What blocks turn queries and keys by."""

    @abstractmethod
    def conditioning(self, state: FlowState) -> dict[str, TensorSpec]:
        """Names, order, shapes and dtypes of what the head makes for all stages."""

    @abstractmethod
    def combined(self, state: FlowState) -> Tensor:
        """The step's prediction, of those of its branches."""

    @abstractmethod
    def final(self, state: FlowState) -> Tensor:
        """The latents, float32 [C, F', H', W']."""

    @abstractmethod
    def handed_on(self, state: FlowState, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        """`specs` of TEXT, EMBEDDING, HIDDEN and CHUNK."""

    def admit(self, job: Job, image: KeyFrames | None) -> FlowState:
        part = self._part
        state = self.state_class(job, latent_spec=self.latent_spec(job))
        state.rotary = {branch: self.rotary(job, branch) for branch in part.branches(job)}
        state.names = tuple(self.conditioning(state))
        if part.is_head or part.is_tail:
            state.solver = self.solver(job)
            state.fresh = contents(state.solver)
            state.latents = self.noise(job).to(part.device)
        return state

    def specs(self, state: FlowState, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        match value:
            case Value.CONDITIONING:
                return tuple(self.conditioning(state).values())
            case Value.LATENTS:
                return (state.latent_spec,)
            case Value.PREDICTION:
                return (TensorSpec(state.latent_spec.shape, self._dtype),)
            case Value.HISTORY:
                return (snapshot.spec_of(state.latent_spec.nbytes),)
            case _:
                return self.handed_on(state, value, item)

    def finish(self, state: FlowState, item: WorkItem) -> None:
        """diffusers steps in float32 and keeps the prediction's dtype."""
        timestep = state.solver.timesteps[item.number]
        state.latents = state.solver.step(self.combined(state), timestep, state.latents, return_dict=False)[0]
        state.predictions.clear()

    def answer(self, state: FlowState, item: WorkItem) -> Tensor | None:
        if item.kind is Kind.DECODE:
            (frames,) = state.take_hidden()
            return frames
        return self.final(state) if state.job.ends_denoising(item) else None

    def end_denoising(self, state: FlowState) -> None:
        state.conditioning, state.names, state.rotary = (), (), {}
        state.solver, state.fresh = None, {}

    def export(self, state: FlowState) -> Mapping[str, Any]:
        solver = state.solver and export_solver(state.solver, state.fresh)
        return {"latents": copied(state.latents), "solver": solver}

    def restore(self, state: FlowState, exported: Mapping[str, Any]) -> None:
        state.latents = copied(exported["latents"])
        if state.solver and exported["solver"] is not None:
            restore_solver(state.solver, exported["solver"])


def make_solver(config: Mapping[str, Any], sigmas: Any, device: torch.device, **shift: float) -> Any:
    """diffusers' Euler scheduler of a config at these noise levels, ready for the first step."""
    solver = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    solver.set_timesteps(sigmas=sigmas, device=device, **shift)
    solver.set_begin_index(0)
    return solver
