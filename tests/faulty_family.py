"""The toy family with faults on demand: a prompt says what, on which stage, at which step, and how."""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from toy_family import ToySpec, ToyStages, ToyState

from cineline.core.codec import Codec
from cineline.core.control import Timeline
from cineline.families.pipeline_parallel import StagePart
from cineline.rank.engine_link import EngineLink

Plan = Callable[..., None]
"""The fixture of that name: has the next engine do faults on purpose, each given as a dict of `Fault`'s fields."""


@dataclass(frozen=True)
class FaultySpec(ToySpec):
    """A toy whose blocks do what the prompt says, such as "raise 1 3": on stage 1 at step 3."""

    stages_class = "faulty_family:FaultyStages"


class FaultyStages(ToyStages):
    def run_blocks(self, state: ToyState, step: int, states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        words = state.job.prompt.split()
        if words[0] == "slow":
            time.sleep(0.02)
        if words[0] == "sleep" and (self.part.place.pp, step) == (int(words[1]), int(words[2])):
            time.sleep(float(words[3]))
        if words[0] in ("raise", "die", "leave", "garble") and (self.part.place.pp, step) == (
            int(words[1]),
            int(words[2]),
        ):
            if words[0] == "raise":
                raise ValueError("a fault on purpose")
            if words[0] == "die":
                os._exit(77)
            link = link_of_this_rank()
            if words[0] == "leave":
                link.leave(Timeline((), {}))
            body = b"d" + {"data": b"none", "message": Codec([]).encode(3), "long": b""}[words[3]]
            size = 2**30 + 1 if words[3] == "long" else len(body)
            os.write(link.connection.fileno(), struct.pack("!i", size) + body)
        return super().run_blocks(state, step, states, text)


def link_of_this_rank() -> EngineLink:
    """What `worker.serve`, from where the caller is called, talks to the engine with."""
    frame = sys._getframe()
    while not isinstance(link := frame.f_locals.get("link"), EngineLink):
        assert frame.f_back is not None
        frame = frame.f_back
    return link


@dataclass(frozen=True)
class InexactSpec(ToySpec):
    """A toy whose state has a number that no snapshot can hold."""

    stages_class = "faulty_family:InexactStages"


class InexactStages(ToyStages):
    def export(self, state: ToyState) -> dict[str, Any]:
        return {**super().export(state), "sigma": np.float32(0.1)}


@dataclass(frozen=True)
class HeavySpec(ToySpec):
    """A toy with weights that take a while to be freed."""

    stages_class = "faulty_family:HeavyStages"


class HeavyStages(ToyStages):
    def load(self, part: StagePart) -> int:
        self.weights = [torch.ones(4_000_000) for _ in range(50)]
        return super().load(part)


@dataclass(frozen=True)
class UnloadableSpec(ToySpec):
    """A toy whose class does not exist, so that its ranks fail while they start."""

    stages_class = "toy_family:NoSuchClass"
