"""Small frozen configs, one per concern, checked at birth."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from cineline.errors import InvalidConfig

Dtype = Literal["float32", "bfloat16"]
ExpertPlacement = Literal["shared", "split"]
DEVICES = ("cpu", "cuda")

AXES = ("cfg", "pp", "ring", "ulysses", "tp")
"""Of the mesh of ranks, the slowest to change first."""

MEANING = {
    "cfg": "guidance branches that run at once",
    "pp": "pipeline stages",
    "ring": "ranks that share the tokens",
    "ulysses": "ranks that share the tokens",
    "tp": "ranks that share each block",
}


@dataclass(frozen=True)
class Place:
    """A rank's coordinates, one for each axis of `AXES`."""

    cfg: int = 0
    pp: int = 0
    ring: int = 0
    ulysses: int = 0
    tp: int = 0


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is divided over ranks: the product of all axes is their number.

    Attributes:
        pp: pipeline stages, at least 1 and at most the model's number of blocks.
        split: blocks on each stage, first to last; None cuts as evenly as can be.
        cfg: 2 gives each branch of classifier-free guidance a line of its own.
        ulysses, ring: ranks of a stage that share the tokens (heads travel, or keys and values do).
        tp: ranks of a stage that share each block's weights.
        expert_placement: "shared" gives every stage blocks of both experts; "split" gives the high-noise expert
            the first `high_stages` stages and the low-noise expert the others, and `split` has the blocks of both.
        high_stages: with split experts; None shares the stages out by the steps of each (see `WanSpec`), or
            follows `split`.

    Raises:
        InvalidConfig: an axis below 1, more than two branches, or a split that does not fit.
    """

    pp: int = 1
    split: Sequence[int] | None = None
    cfg: int = 1
    ulysses: int = 1
    ring: int = 1
    tp: int = 1
    expert_placement: ExpertPlacement = "shared"
    high_stages: int | None = None

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if type(size) is not int:
                raise InvalidConfig(f"{axis}={size!r} is no whole number: give the number of {MEANING[axis]}.")
            if size < 1:
                raise InvalidConfig(f"{axis}={size} is too small: give at least 1.")
        if self.cfg > 2:
            raise InvalidConfig(f"cfg={self.cfg} is too much: guidance has 2 branches, use cfg=2.")
        if self.expert_placement not in get_args(ExpertPlacement):
            raise InvalidConfig(f"expert_placement={self.expert_placement!r} is not known: use shared or split.")
        if self.expert_placement == "split" and self.pp < 2:
            raise InvalidConfig(f"expert_placement='split' needs a stage for each expert: pp={self.pp} is too small.")
        if self.high_stages is not None:
            if self.expert_placement == "shared":
                raise InvalidConfig(f"high_stages={self.high_stages} is for expert_placement='split': leave it out.")
            if type(self.high_stages) is not int or not 1 <= self.high_stages < self.pp:
                raise InvalidConfig(f"high_stages={self.high_stages!r} of pp={self.pp}: use 1 to {self.pp - 1}.")
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

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the axes, in the order of `AXES`."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return math.prod(self.sizes)

    @property
    def lanes(self) -> int:
        """Ranks of a stage."""
        return self.ring * self.ulysses * self.tp

    def place(self, rank: int) -> Place:
        """The coordinates of a rank: the last axis changes fastest, so that its ranks are nearest to each other."""
        coordinates = []
        for size in reversed(self.sizes):
            rank, coordinate = divmod(rank, size)
            coordinates.append(coordinate)
        return Place(*reversed(coordinates))

    def rank(self, place: Place) -> int:
        """The rank at these coordinates."""
        number = 0
        for axis, size in zip(AXES, self.sizes, strict=True):
            number = number * size + getattr(place, axis)
        return number

    def advice(self, ranks: int) -> str:
        """What would fit that many ranks: other stages, or stages alone."""
        others, least = self.ranks // self.pp, 2 if self.expert_placement == "split" else 1
        if ranks % others == 0 and ranks // others >= least:
            return f"pp={ranks // others} with the other axes as they are would fit"
        return f"pp={ranks} alone would fit" if ranks >= least else "expert_placement='shared' would fit"

    def __str__(self) -> str:
        """The axes that divide anything, as cfg=2 x pp=2 or pp=3 x split 2+1."""
        named = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        if self.expert_placement == "split":
            stages = "" if self.high_stages is None else " " + "+".join(str(len(group)) for group in self.groups)
            named.append(f"split{stages}")
        return " x ".join(named) or "pp=1"

    @property
    def groups(self) -> list[range]:
        """The stages that run a step together: all, or with split experts those of each one (`placed` comes first)."""
        if self.expert_placement == "shared":
            return [range(self.pp)]
        assert self.high_stages is not None
        return [range(self.high_stages), range(self.high_stages, self.pp)]

    def placed(self, layers: int, high_share: float) -> ParallelConfig:
        """With split experts, the config that says how many stages each of them has.

        Args:
            layers: blocks of an expert.
            high_share: of the steps that are the high-noise expert's; it gets that share of the stages, or where
                a `split` is given, those whose blocks make up an expert.
        """
        if self.expert_placement == "shared" or self.high_stages is not None:
            return self
        if self.split is None:
            counts = range(max(1, self.pp - layers), min(layers, self.pp - 1) + 1)
            if not counts:
                raise InvalidConfig(
                    f"pp={self.pp} is more than the {layers} blocks of each expert: use at most {2 * layers} stages."
                )
            best = min(counts, key=lambda high: max(high_share / high, (1 - high_share) / (self.pp - high)))
            return replace(self, high_stages=best)
        for high in range(1, self.pp):
            if sum(self.split[:high]) == layers:
                return replace(self, high_stages=high)
        raise InvalidConfig(
            f"split={list(self.split)}: with split experts its first entries must add up to the {layers} blocks of an "
            "expert, and so must the others."
        )

    def cut(self, layers: int) -> list[range]:
        """The blocks of each stage, first to last, for a model of `layers` blocks (each expert's, where it is split).

        Raises:
            InvalidConfig: more stages than blocks, or a split that does not add up.
        """
        return [blocks for group in self.groups for blocks in self._cut_group(group, layers)]

    def _cut_group(self, group: range, layers: int) -> list[range]:
        stages = len(group)
        if stages > layers:
            raise InvalidConfig(f"pp={stages} is more than the model's {layers} blocks: use at most {layers} stages.")
        even = [layers // stages + (stage < layers % stages) for stage in range(stages)]
        sizes = even if self.split is None else self.split[group.start : group.stop]
        if sum(sizes) != layers:
            raise InvalidConfig(
                f"split={list(sizes)} adds up to {sum(sizes)}, but the model has {layers} blocks: make it add up."
            )
        starts = [sum(sizes[:stage]) for stage in range(stages)]
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def stages_alone(parallel: ParallelConfig) -> ParallelConfig:
    """The config as it is, for a family of one expert whose blocks run on one rank each.

    Raises:
        InvalidConfig: another axis than pp and cfg divides something.
    """
    if parallel.lanes > 1 or parallel.expert_placement == "split":
        raise InvalidConfig(f"{parallel}: this model can be divided by pp and cfg alone.")
    return parallel


@dataclass(frozen=True)
class DeviceConfig:
    """What the ranks compute on and in.

    Attributes:
        device: "cpu", or an accelerator's torch name ("cuda"); a rank takes the one of its local number.
        dtype: of the transformers and the text encoder.
        vae_dtype: of the VAE.
        pin_cores: pin rank r to core r modulo the host's cores (benchmarks).
        allow_untested_device: try another of torch's accelerators (such as "npu" or "xpu"), on which nothing of
            this has been run.
    """

    device: str = "cpu"
    dtype: Dtype = "float32"
    vae_dtype: Dtype = "float32"
    pin_cores: bool = False
    allow_untested_device: bool = False

    def __post_init__(self) -> None:
        if self.device not in DEVICES and not self.allow_untested_device:
            raise InvalidConfig(
                f"device={self.device!r} has not been tried: use {' or '.join(DEVICES)}, or --allow-untested-device."
            )
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
