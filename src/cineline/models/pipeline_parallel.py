"""`PipelineParallelMixin`: what a model family says of itself so that the line can run it.

The line (scheduler, channels, stage loop, engine) knows nothing else of a model. A family has a
`FamilySpec` (the rules for its requests, no torch) and a class with this mixin, one instance a rank.

Legend: P stages; the head is the first stage, the tail the last, one stage alone is both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image

from cineline.channel import Pending, TensorSpec
from cineline.config import DeviceConfig
from cineline.request import Branch, Job


@dataclass(frozen=True)
class StagePart:
    """One stage's place in the line and its share of the model.

    Attributes:
        stage: 0 to stages - 1.
        stages: P.
        layers: the blocks it runs, of each of the family's block stacks.
        device: where it computes.
        config: dtypes and the like.
    """

    stage: int
    stages: int
    layers: range
    device: torch.device
    config: DeviceConfig

    @property
    def is_head(self) -> bool:
        return self.stage == 0

    @property
    def is_tail(self) -> bool:
        return self.stage == self.stages - 1


@dataclass
class RequestState:
    """What a stage keeps of one request, from admission to the last item or the drop.

    A family may subclass it.

    Attributes:
        job: the resolved request.
        image: the first frame, on the head alone.
        conditioning: made once by the head's `encode`, handed to all stages in this order.
        latents: the current ones: on the head the input of the step, on the tail its result.
        returning, return_number: the head's posted receive of the next latents, and which one of all it is.
        predictions: on the tail, the step's predictions so far.
    """

    job: Job
    image: Image.Image | None = None
    conditioning: dict[str, torch.Tensor] = field(default_factory=dict)
    latents: torch.Tensor | None = None
    returning: Pending | None = None
    return_number: int = 0
    predictions: dict[Branch, torch.Tensor] = field(default_factory=dict)


State = TypeVar("State", bound=RequestState)
Hidden = tuple[torch.Tensor, ...]


class PipelineParallelMixin(ABC, Generic[State]):
    """A model family, cut: the part that one stage runs.

    A denoise item calls `embed` on the head, `run_blocks` on every stage, `predict` on the tail;
    `advance` ends the step there and its result goes back to the head. An encode item calls `encode`
    on the head; a decode item calls `decode` on the tail. Tensors that a method returns must be new:
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

    @abstractmethod
    def final_latents(self, state: State) -> torch.Tensor:
        """Tail, after the last step: what the user gets, float32 [C, F', H', W']."""

    @abstractmethod
    def decode(self, state: State, chunk: int) -> np.ndarray:
        """Tail: the frames of one chunk, uint8 [F, H, W, 3]."""
