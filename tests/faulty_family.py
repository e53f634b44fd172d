"""The toy family with faults on demand: a prompt says on which stage, at which step, and what."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from toy_family import ToySpec, ToyStages, ToyState


@dataclass(frozen=True)
class FaultySpec(ToySpec):
    """A toy whose blocks do what the prompt says, such as "raise 1 3": on stage 1 at step 3."""

    stages_class = "faulty_family:FaultyStages"


class FaultyStages(ToyStages):
    def run_blocks(self, state: ToyState, step: int, states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        words = state.job.prompt.split()
        if words[0] == "slow":
            time.sleep(0.02)
        if words[0] in ("raise", "die") and (self.part.place.pp, step) == (int(words[1]), int(words[2])):
            if words[0] == "raise":
                raise ValueError("a fault on purpose")
            os._exit(77)
        return super().run_blocks(state, step, states, text)


@dataclass(frozen=True)
class UnloadableSpec(ToySpec):
    """A toy whose class does not exist, so that its ranks fail while they start."""

    stages_class = "toy_family:NoSuchClass"
