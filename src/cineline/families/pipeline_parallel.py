"""`PipelineParallelMixin`: what a model family says of itself so that the line can run it.

The line (scheduler, channels, stage loop, engine) knows nothing else of a model. A family has a
`FamilySpec` (the rules for its requests, no torch) and a class with this mixin, one instance a rank.

Legend: P stages; the head is the first stage, the tail the last, one stage alone is both. A stage may be several
ranks: then each of them is a head, a tail, or neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch.distributed.device_mesh import DeviceMesh

from cineline.core.config import Cut, DeviceConfig, ParallelConfig, Place
from cineline.core.request import Branch, Job, Kind, WorkItem
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
        job: the resolved request.
        image: the first frame, on the head alone.
        texts: on the head, embeddings of the prompts until they are used.
        conditioning: made once by the head's `encode`, handed to all stages in this order.
        latents: the current ones: on the head the input of the step, on the tail its result.
        predictions: on the tail, the step's predictions so far.
        hidden: what the stage before has handed on, or what this one has made to be handed on.
    """

    job: Job
    image: Image.Image | None = None
    texts: dict[Branch, torch.Tensor] = field(default_factory=dict)
    conditioning: dict[str, torch.Tensor] = field(default_factory=dict)
    latents: torch.Tensor | None = None
    predictions: dict[Branch, torch.Tensor] = field(default_factory=dict)
    hidden: Hidden = ()


State = TypeVar("State", bound=RequestState)


class PipelineParallelMixin(ABC, Generic[State]):
    """A model family, cut: the part that one stage runs.

    A denoise item calls `embed` on the head, `run_blocks` on every stage, `predict` on the tail;
    `advance` ends the step there and its result goes back to the head. A text item (where a job has `texts`) calls
    `encode_text` on every stage, and its result goes back to the head; an encode item calls `encode` on the head; a
    decode item calls `decode` on every stage, or on the tail alone. Tensors that a method keeps or returns must be new:
    the line reuses the buffers of those it was given.
    """

    @abstractmethod
    def load(self, part: StagePart) -> int:
        """Build this stage's modules and read their weights, and no others; the bytes read.

        Raises:
            CheckpointError: a tensor is missing, extra, misshapen or truncated.
        """

    @abstractmethod
    def admit(self, job: Job, image: Image.Image | None) -> State:
        """A new request; `image` on the head alone."""

    def text_specs(self, state: State) -> tuple[TensorSpec, ...]:
        """What travels over a forward edge with a text item."""
        return (self.embedding_spec(state),)

    def embedding_spec(self, state: State) -> TensorSpec:
        """What the tail sends back to the head after a text item."""
        raise NotImplementedError("a family whose jobs have texts says what travels with them")

    def encode_text(self, state: State, branch: Branch, hidden: Hidden) -> Hidden:
        """Every stage: its layers of the text encoder. The head is given nothing; the tail gives the embedding."""
        raise NotImplementedError("a family whose jobs have texts encodes them")

    @abstractmethod
    def encode(self, state: State) -> Mapping[str, torch.Tensor]:
        """Head: all that the stages need of the request beside the hidden states, computed once."""

    @abstractmethod
    def conditioning_specs(self, state: State) -> Mapping[str, TensorSpec]:
        """Names, order, shapes and dtypes of what `encode` returns on the head."""

    @abstractmethod
    def hidden_specs(self, state: State) -> tuple[TensorSpec, ...]:
        """What travels over a forward edge with a denoise item."""

    @abstractmethod
    def latents_spec(self, state: State) -> TensorSpec:
        """What travels back from tail to head after a step."""

    def expert(self, state: State, step: int) -> int:
        """Which of the family's experts a step needs; with split experts they are on different stages."""
        return 0

    def history_specs(self, state: State) -> tuple[TensorSpec, ...]:
        """With split experts, what moves to the second one's tail: the latents and `history`."""
        raise NotImplementedError("a family of several experts says what its solver keeps")

    def history(self, state: State) -> Sequence[torch.Tensor]:
        """The first expert's tail, after its last step: the tensors that the solver keeps from step to step."""
        raise NotImplementedError("a family of several experts says what its solver keeps")

    def take_history(self, state: State, tensors: Sequence[torch.Tensor]) -> None:
        """The second expert's tail, before its first step: latents and history, to be copied."""
        raise NotImplementedError("a family of several experts says what its solver keeps")

    def prediction_spec(self, state: State) -> TensorSpec:
        """What the tail of the second branch's line sends to the first's, with CFG parallelism."""
        return self.latents_spec(state)

    @abstractmethod
    def embed(self, state: State, step: int, branch: Branch) -> Hidden:
        """Head: from the latents to the hidden states before the first block."""

    @abstractmethod
    def run_blocks(self, state: State, step: int, branch: Branch, hidden: Hidden) -> Hidden:
        """Every stage: its own blocks."""

    @abstractmethod
    def predict(self, state: State, step: int, branch: Branch, hidden: Hidden) -> torch.Tensor:
        """Tail: from the hidden states after the last block to the prediction."""

    @abstractmethod
    def advance(self, state: State, step: int) -> torch.Tensor:
        """Tail: guidance over `state.predictions` and one solver step; the new latents, also kept in the state."""

    def end_denoising(self, state: State) -> None:
        """Every stage that decodes, after the last step that it has to do with: free what decoding does not need."""

    @abstractmethod
    def final_latents(self, state: State) -> torch.Tensor:
        """Tail, after the last step: what the user gets, float32 [C, F', H', W']."""

    def decode_specs(self, state: State, chunk: int) -> tuple[TensorSpec, ...]:
        """Every stage but the head: what travels over the edge from the stage before with a chunk."""
        raise NotImplementedError("a family whose decoder is cut over the stages says what travels")

    @abstractmethod
    def decode(self, state: State, chunk: int, hidden: Hidden) -> Hidden:
        """A chunk through this stage's part of the decoder; from the tail come frames, uint8 [F, H, W, 3].

        Where the decoder is cut, the head begins with the last step's latents, and `hidden` is what the stage before
        returned. Where it is not, the tail does all of it, or all stages do it together.
        """

    # What the stage loop calls, in the words of a script: which of the methods above that means.

    def specs(self, state: State, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        """Of the tensors in which a value travels that the item makes; none where there is nothing in it."""
        match value:
            case Value.TEXT:
                return self.text_specs(state)
            case Value.EMBEDDING:
                return (self.embedding_spec(state),)
            case Value.CONDITIONING:
                return tuple(self.conditioning_specs(state).values())
            case Value.HIDDEN:
                return self.hidden_specs(state)
            case Value.PREDICTION:
                return (self.prediction_spec(state),)
            case Value.LATENTS:
                return (self.latents_spec(state),)
            case Value.HISTORY:
                return self.history_specs(state)
            case Value.CHUNK:
                return self.decode_specs(state, item.number)

    def take(self, state: State, value: Value, item: WorkItem, tensors: Hidden) -> None:
        """A value that has come, made by the item; its tensors are lent until they are freed."""
        match value:
            case Value.EMBEDDING:
                (state.texts[item.branch],) = tensors
            case Value.CONDITIONING:
                state.conditioning.update(zip(self.conditioning_specs(state), tensors, strict=True))
            case Value.PREDICTION:
                (state.predictions[item.branch],) = tensors
            case Value.LATENTS:
                (state.latents,) = tensors
            case Value.HISTORY:
                self.take_history(state, tensors)
            case _:
                state.hidden = tensors

    def give(self, state: State, value: Value, item: WorkItem) -> Hidden:
        """A value that is to go, made by the item."""
        match value:
            case Value.CONDITIONING:
                return tuple(state.conditioning[name] for name in self.conditioning_specs(state))
            case Value.PREDICTION:
                return (state.predictions.pop(item.branch),)
            case Value.LATENTS:
                assert state.latents is not None
                return (state.latents,)
            case Value.HISTORY:
                assert state.latents is not None
                return state.latents, *self.history(state)
            case _:
                made, state.hidden = state.hidden, ()
                return made

    def compute(self, state: State, item: WorkItem, starts: bool, ends: bool) -> None:
        """This rank's slice of the item: nothing was handed to it (`starts`), it is the last one (`ends`), or both."""
        came, state.hidden = () if starts else state.hidden, ()
        match item.kind:
            case Kind.TEXT:
                state.hidden = self.encode_text(state, item.branch, came)
            case Kind.ENCODE if starts:
                state.conditioning.update(self.encode(state))
                state.texts.clear()
            case Kind.DENOISE:
                came = self.embed(state, item.number, item.branch) if starts else came
                came = self.run_blocks(state, item.number, item.branch, came)
                if ends:
                    state.predictions[item.branch] = self.predict(state, item.number, item.branch, came)
                else:
                    state.hidden = came
            case Kind.DECODE:
                state.hidden = self.decode(state, item.number, came)

    def finish(self, state: State, item: WorkItem) -> None:
        """End of a step, all of whose predictions are here."""
        state.latents = self.advance(state, item.number)
        state.predictions.clear()

    def answer(self, state: State, item: WorkItem) -> torch.Tensor | None:
        """What the engine is told with the end of the item's group: a chunk's frames, or the final latents."""
        if item.kind is Kind.DECODE:
            (frames,), state.hidden = state.hidden, ()
            return frames
        is_last = item.kind is Kind.DENOISE and item.number + 1 == state.job.steps
        return self.final_latents(state).float() if is_last else None
