"""`PipelineParallelMixin`: what a model family says of itself so that the line can run it.

The line (scheduler, channels, stage loop, engine) knows nothing else of a model. A family has a
`FamilySpec` (the rules for its requests, no torch) and a class with this mixin, one instance a rank, whose methods
are what a script's words mean (`schedule.words`).

Legend: P stages; the head is the first stage, the tail the last, one stage alone is both. A stage may be several
ranks: then each of them is a head, a tail, or neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh

from cineline.core.config import Cut, DeviceConfig, ParallelConfig, Place
from cineline.core.image import KeyFrames
from cineline.core.request import Branch, Job, Kind, WorkItem
from cineline.families import snapshot
from cineline.schedule.words import Value
from cineline.transport.axis import Axis, Traffic
from cineline.transport.channel import TensorSpec


@dataclass(frozen=True)
class StagePart:
    """One rank's place in the mesh and its share of the model.

    Attributes:
        place: its coordinates. parallel: the sizes of the axes.
        cut: what its stage holds of each component.
        device: where it computes.
        config: dtypes and the like.
        mesh: the process groups of the axes; None for a world of one rank.
        traffic: bytes that this rank has sent, by axis.
    """

    place: Place
    parallel: ParallelConfig
    cut: Cut
    device: torch.device
    config: DeviceConfig
    mesh: DeviceMesh | None = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def is_head(self) -> bool:
        return self.place.pp == 0

    @property
    def is_tail(self) -> bool:
        return self.place.pp == self.parallel.pp - 1

    @property
    def decodes(self) -> bool:
        """Whether this rank has a part in decoding, which is one rank's of a stage."""
        return self.place.leads and self.place.pp in self.parallel.decoders

    @property
    def takes_latents(self) -> bool:
        """Whether decoding begins here."""
        return self.decodes and self.parallel.takes_latents(self.place.pp)

    @property
    def rank(self) -> int:
        return self.parallel.rank(self.place)

    def axis(self, name: str) -> Axis:
        """The ranks that differ from this one in that coordinate alone."""
        return Axis(self.mesh, name, self.traffic)

    def branches(self, job: Job) -> tuple[Branch, ...]:
        """The branches of the job that this rank's line runs."""
        own = [self.place.cfg] if self.parallel.cfg == 2 else range(job.branches)
        return tuple(Branch(branch) for branch in own)


Hidden = tuple[torch.Tensor, ...]


@dataclass
class RequestState:
    """What a stage keeps of one request, from admission to the last item or the drop.

    A family may subclass it.

    Attributes:
        job: the resolved request; here it is known which steps are skipped.
        texts: on the head, embeddings of the prompts until they are used.
        conditioning: what the head has made for all stages, once.
        latents: the current ones: on the head the input of the step, on the tail its result.
        predictions: on the tail, the step's predictions so far.
        hidden: what the stage before has handed on, or what this one has made to be handed on.
    """

    job: Job
    texts: dict[Branch, torch.Tensor] = field(default_factory=dict)
    conditioning: Hidden = ()
    latents: torch.Tensor | None = None
    predictions: dict[Branch, torch.Tensor] = field(default_factory=dict)
    hidden: Hidden = ()

    def take_hidden(self) -> Hidden:
        """What was handed on, for the one who works on it."""
        hidden, self.hidden = self.hidden, ()
        return hidden

    def made(self, item: WorkItem, ends: bool) -> Hidden:
        """What this rank's slice of the item has made, as `compute` leaves it."""
        if item.kind is Kind.ENCODE:
            return self.conditioning
        if item.kind is Kind.DENOISE and ends:
            return (self.predictions[item.branch],)
        return self.hidden


State = TypeVar("State", bound=RequestState)


class PipelineParallelMixin(ABC, Generic[State]):
    """A model family, cut: the part that one stage runs.

    Tensors that a method keeps or hands on must be new: the line reuses the buffers of those it was given.

    Args:
        spec: the family's `FamilySpec`.
    """

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    @abstractmethod
    def load(self, part: StagePart) -> int:
        """Build this stage's modules and read their weights, and no others; the bytes read.

        Raises:
            CheckpointError: a tensor is missing, extra, misshapen or truncated.
        """

    @abstractmethod
    def admit(self, job: Job, image: KeyFrames | None) -> State:
        """A new request; `image` on the head alone."""

    @abstractmethod
    def specs(self, state: State, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        """Of the tensors in which a value travels that the item makes; none where there is nothing in it.

        They follow from the job alone: every rank gets ready for them before anything arrives.
        """

    @abstractmethod
    def compute(self, state: State, item: WorkItem, starts: bool, ends: bool) -> None:
        """This rank's slice of the item: nothing was handed to it (`starts`), it is the last one (`ends`), or both.

        TEXT: layers of the text encoder, from a prompt to its embedding. ENCODE: on the head the conditioning; the
        others only hand it on. DENOISE: blocks, from the latents to the prediction of the item's branch. DECODE: units
        of the decoder, from the latents to a chunk of frames. What is made goes into the state: `hidden`, at the end of
        a DENOISE item `predictions`, of ENCODE `conditioning`.
        """

    @abstractmethod
    def finish(self, state: State, item: WorkItem) -> None:
        """End of a step, all of whose predictions are here: guidance and solver, new `latents`."""

    @abstractmethod
    def answer(self, state: State, item: WorkItem) -> torch.Tensor | None:
        """What the engine is told with the end of the item's group: a chunk's frames, uint8 [F, H, W, 3], with the last
        step the final latents, float32 [C, F', H', W'], with a step that `Job.previews` a small picture of what comes,
        uint8 [F', H', W', 3], where the family makes some, else nothing."""

    def end_denoising(self, state: State) -> None:
        """Every stage that decodes, after the last step that it has to do with: free what decoding does not need."""

    def rehearsals(self) -> Iterable[tuple[Job, KeyFrames | None]]:
        """Small jobs, one of each class of shapes, with the head's image: an accelerator's ranks run them when they are
        loaded, so that no kernel is used for the first time while the line waits."""
        return ()

    def expert(self, state: State, step: int) -> int:
        """Which of the family's experts a step needs; with split experts they are on different stages."""
        return 0

    # A request goes on elsewhere: from its snapshot, or with split experts from one's stages to the other's.

    @abstractmethod
    def export(self, state: State) -> Mapping[str, Any]:
        """All that steps and decoding so far have changed of the state, copied: another rank can go on with it.

        Tensors, Python's numbers, texts and None, in lists and in dicts by text: else a request has no snapshots
        (`families.snapshot.write`). It looks at no values of a device's tensors: it is called after each step. `specs`
        says how many bytes the HISTORY is at most, which is sent before anything is decoded.
        """

    @abstractmethod
    def restore(self, state: State, exported: Mapping[str, Any]) -> None:
        """Go on from there, with a state that `admit` has made of the same job, and which has latents.

        What was exported at the end of a line comes to each rank that goes on: each takes what it has itself.
        """

    # What travels, in and out of the state.

    def take(self, state: State, value: Value, item: WorkItem, tensors: Hidden) -> None:
        """A value that has come, made by the item; its tensors are lent until they are freed."""
        match value:
            case Value.EMBEDDING:
                (state.texts[item.branch],) = tensors
            case Value.CONDITIONING:
                state.conditioning = tensors
            case Value.PREDICTION:
                (state.predictions[item.branch],) = tensors
            case Value.LATENTS:
                (state.latents,) = tensors
            case Value.HISTORY:
                self.restore(state, snapshot.unpack(*tensors))
            case _:
                state.hidden = tensors

    def give(self, state: State, value: Value, item: WorkItem) -> Hidden:
        """A value that is to go, made by the item."""
        match value:
            case Value.CONDITIONING:
                return state.conditioning
            case Value.PREDICTION:
                return (state.predictions.pop(item.branch),)
            case Value.LATENTS:
                assert state.latents is not None
                return (state.latents,)
            case Value.HISTORY:
                assert state.latents is not None
                (spec,) = self.specs(state, value, item)
                return (snapshot.pack(self.export(state), spec, state.latents.device),)
            case _:
                return state.take_hidden()
