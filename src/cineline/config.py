"""Small frozen configs, one per concern, checked at birth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cineline.errors import InvalidConfig

Dtype = Literal["float32", "bfloat16"]
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is divided over ranks.

    Attributes:
        pp: pipeline stages, at least 1 and at most the model's number of blocks.
        split: blocks on each stage, first to last; None cuts as evenly as can be.

    Raises:
        InvalidConfig: fewer than one stage, or a split that does not fit.
    """

    pp: int = 1
    split: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if type(self.pp) is not int:
            raise InvalidConfig(f"pp={self.pp!r} is no whole number: give the number of stages.")
        if self.pp < 1:
            raise InvalidConfig(f"pp={self.pp} is too small: give at least 1 stage.")
        if self.split is None:
            return
        if isinstance(self.split, str) or not all(type(size) is int for size in self.split):
            raise InvalidConfig(f"split={self.split!r} is no list of whole numbers: give one such as [5, 2, 1].")
        object.__setattr__(self, "split", tuple(self.split))
        if len(self.split) != self.pp:
            raise InvalidConfig(
                f"split={list(self.split)} has {len(self.split)} entries for pp={self.pp}: give one entry a stage."
            )
        if min(self.split) < 1:
            raise InvalidConfig(f"split={list(self.split)} has an empty stage: give each stage at least 1 block.")

    def cut(self, layers: int) -> list[range]:
        """The blocks of each stage, first to last, for a model of `layers` blocks.

        Raises:
            InvalidConfig: more stages than blocks, or a split that does not add up.
        """
        if self.pp > layers:
            raise InvalidConfig(f"pp={self.pp} is more than the model's {layers} blocks: use at most {layers} stages.")
        sizes = self.split or [layers // self.pp + (stage < layers % self.pp) for stage in range(self.pp)]
        if sum(sizes) != layers:
            raise InvalidConfig(
                f"split={list(sizes)} adds up to {sum(sizes)}, but the model has {layers} blocks: make it add up."
            )
        starts = [sum(sizes[:stage]) for stage in range(self.pp)]
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


@dataclass(frozen=True)
class DeviceConfig:
    """What the ranks compute on and in.

    Attributes:
        device: "cpu", or an accelerator's torch name ("cuda"); a rank takes the one of its local number.
        dtype: of the transformers and the text encoder.
        vae_dtype: of the VAE.
        pin_cores: pin rank r to core r modulo the host's cores (benchmarks).
    """

    device: str = "cpu"
    dtype: Dtype = "float32"
    vae_dtype: Dtype = "float32"
    pin_cores: bool = False

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InvalidConfig(f"device={self.device!r} has not been tried: use {' or '.join(DEVICES)}.")
        for name in ("dtype", "vae_dtype"):
            value = getattr(self, name)
            if value not in get_args(Dtype):
                raise InvalidConfig(f"{name}={value!r} is not supported: use float32 or bfloat16.")

    def rank_environment(self, ranks_on_host: int) -> dict[str, str]:
        """Environment of a rank process, to be set before torch loads.

        `MKL_CBWR` makes MKL's products independent of pointer alignment. On the CPU the host's
        cores are divided among its ranks unless `OMP_NUM_THREADS` says otherwise.
        """
        environment = dict(os.environ)
        environment.setdefault("MKL_CBWR", "AUTO")
        if self.device == "cpu":
            threads = str(max(1, len(os.sched_getaffinity(0)) // ranks_on_host))
            asked = environment.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list is for nested regions
            environment["OMP_NUM_THREADS"] = asked if asked.isascii() and asked.isdigit() and int(asked) else threads
            environment.setdefault("MKL_NUM_THREADS", environment["OMP_NUM_THREADS"])
        return environment
