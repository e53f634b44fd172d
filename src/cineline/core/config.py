"""Small frozen configs, one per concern, checked at birth."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from cineline.errors import InvalidConfig, shown

Dtype = Literal["float32", "bfloat16", "float16"]
TextEncoder = Literal["resident", "reload", "cpu"]
"""Where a stage keeps its layers of the text encoder: on its device, there only while prompts are encoded, or in the
host's memory, where they are run too."""

Compared = Literal["samples", "content"]
"""What of a checkpoint's weights hosts compare: headers and a sample of each tensor, or all bytes."""

ExpertPlacement = Literal["shared", "split"]
VaeDecode = Literal["layers", "rows", "tail", "tiled"]
"""How the VAE decodes: its layers cut over the stages (exact), the picture's rows shared out among them (close), all
of it on the last stage (exact), or there in overlapping tiles (lossy)."""
DEVICES = ("cpu", "cuda")

MOST_THREADS = 1024
"""Of a rank. More than cores are slow, and give the bits of a larger machine."""

AXES = ("cfg", "pp", "ring", "ulysses", "tp")
"""Of the mesh of ranks, the slowest to change first."""

MEANING = {
    "cfg": "guidance branches that run at once",
    "pp": "pipeline stages",
    "ring": "ranks that share the tokens",
    "ulysses": "ranks that share the tokens",
    "tp": "ranks that share each block",
}


UNITS = {"split": "blocks", "text_split": "layers of the text encoder", "vae_split": "units of the VAE's decoder"}

MOST_RANKS = 100_000
"""Along an axis; more is taken for a slip of the hand."""

LEAST = {"split": 1, "text_split": 0, "vae_split": 0}
"""Of these units, on each stage."""


def texts_of(owner: type) -> dict[str, str]:
    """The fields that are options too, each with its help: the text in its annotation, else the `Literal`'s values."""
    texts = {}
    for name, hint in get_type_hints(owner, include_extras=True).items():
        own = [text for text in getattr(hint, "__metadata__", ()) if isinstance(text, str)]
        if own or get_origin(hint) is Literal:
            texts[name] = own[0] if own else " or ".join(get_args(hint))
    return texts


@dataclass(frozen=True)
class Place:
    """A rank's coordinates, one for each axis of `AXES`."""

    cfg: int = 0
    pp: int = 0
    ring: int = 0
    ulysses: int = 0
    tp: int = 0

    @property
    def is_first_lane(self) -> bool:
        """Of the ranks of its stage, the one that does what they need not all do."""
        return self == Place(cfg=self.cfg, pp=self.pp)

    @property
    def leads(self) -> bool:
        """Of the ranks that compute the same latents, the one that answers for them."""
        return self == Place(pp=self.pp)


@dataclass(frozen=True)
class Cut:
    """What one stage holds: numbers of units of each stack, in the order in which the stages run them.

    Attributes:
        blocks: of the transformer (of each expert).
        text: layers of the text encoder. Its embedding is on the first stage, its last norm on the last one.
        decoder: units of the VAE's decoder, in the family's order.
    """

    blocks: range
    text: range = range(0)
    decoder: range = range(0)


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is divided over ranks: the product of all axes is their number.

    Attributes, beyond what the options' texts say:
        pp: at most the model's number of blocks.
        split: first to last; None cuts as evenly as can be.
        expert_placement: "shared" gives every stage blocks of both experts; "split" gives the high-noise expert
            the first `high_stages` stages and the low-noise expert the others, and `split` has the blocks of both.
        text_split, vae_split: a stage may have none.
        high_stages: with split experts; None shares the stages out by the steps of each (see the family's spec), or
            follows `split`.

    Raises:
        InvalidConfig: an axis below 1, more than two branches, or a split that does not fit.
    """

    pp: Annotated[int, "Pipeline stages"] = 1
    split: Annotated[Sequence[int] | None, "Blocks on each stage, such as 5,2,1"] = None
    cfg: Annotated[int, "2 runs both branches of guidance at once, on a line each"] = 1
    ulysses: Annotated[int, "Ranks of a stage that share the tokens, by heads"] = 1
    ring: Annotated[int, "Ranks of a stage that share the tokens, in a ring"] = 1
    tp: Annotated[int, "Ranks of a stage that share each block's weights"] = 1
    expert_placement: Annotated[ExpertPlacement, "shared, or split: the two experts on stages of their own"] = "shared"
    high_stages: int | None = None
    text_split: Annotated[
        Sequence[int] | None, "Layers of the text encoder on each stage, such as 10,14; balances weights"
    ] = None
    vae_split: Annotated[
        Sequence[int] | None, "Units of the VAE's decoder on each stage, such as 11,4; balances time"
    ] = None
    vae_decode: Annotated[
        VaeDecode,
        "layers: cut over the stages, exact; rows: each has some of the picture, close; tail: on the last stage; "
        "tiled: there, lossy",
    ] = "layers"

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if type(size) is not int:
                raise InvalidConfig(f"{axis}={shown(size)} is no whole number: give the number of {MEANING[axis]}.")
            if size < 1:
                raise InvalidConfig(f"{axis}={shown(size)} is too small: give at least 1.")
            if size > MOST_RANKS:
                raise InvalidConfig(f"{axis}={shown(size)} is above {MOST_RANKS}: give less.")
        if self.cfg > 2:
            raise InvalidConfig(f"cfg={shown(self.cfg)} is too much: guidance has 2 branches, use cfg=2.")
        if self.expert_placement not in get_args(ExpertPlacement):
            raise InvalidConfig(f"expert_placement={shown(self.expert_placement)} is not known: use shared or split.")
        if self.expert_placement == "split" and self.pp < 2:
            raise InvalidConfig(f"expert_placement='split' needs a stage for each expert: pp={self.pp} is too small.")
        if self.high_stages is not None:
            if self.expert_placement == "shared":
                raise InvalidConfig(
                    f"high_stages={shown(self.high_stages)} is for expert_placement='split': leave it out."
                )
            if type(self.high_stages) is not int or not 1 <= self.high_stages < self.pp:
                raise InvalidConfig(f"high_stages={shown(self.high_stages)} of pp={self.pp}: use 1 to {self.pp - 1}.")
        if self.vae_decode not in get_args(VaeDecode):
            known = ", ".join(get_args(VaeDecode))
            raise InvalidConfig(f"vae_decode={shown(self.vae_decode)} is not known: use one of {known}.")
        for name, least in LEAST.items():
            self._check_split(name, least)
        if self.vae_split is not None and self.vae_decode != "layers":
            raise InvalidConfig(f"vae_split is for vae_decode='layers', not {shown(self.vae_decode)}: leave it out.")

    def _check_split(self, name: str, least: int) -> None:
        """A split as a tuple, one entry of at least so many units a stage."""
        split = getattr(self, name)
        if split is None:
            return
        if isinstance(split, str) or not all(type(size) is int for size in split):
            raise InvalidConfig(f"{name}={shown(split)} is no list of whole numbers: give one such as [5, 2, 1].")
        object.__setattr__(self, name, tuple(split))
        if len(split) != self.pp:
            raise InvalidConfig(
                f"{name}={shown(list(split))} has {len(split)} entries for pp={self.pp}: give one entry a stage."
            )
        if min(split) < least:
            raise InvalidConfig(
                f"{name}={shown(list(split))} has an entry below {least}: give each stage {least} or more."
            )

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

    def route(self, expert: int) -> range:
        """The stages that run a step of this expert."""
        return self.groups[min(expert, len(self.groups) - 1)]

    @property
    def encoders(self) -> tuple[int, ...]:
        """The stages that a prompt goes through: the head, which has the tokens' embedding, those with layers of the
        text encoder, and the tail, which has its last norm."""
        inside: Iterable[int] = range(1, self.pp - 1)
        if self.text_split is not None:
            inside = [stage for stage in inside if self.text_split[stage]]
        return tuple(sorted({0, *inside, self.pp - 1}))

    @property
    def decoders(self) -> tuple[int, ...]:
        """The stages that decode: those with units of the decoder, where it is cut."""
        if self.vae_decode not in ("layers", "rows"):
            return (self.pp - 1,)
        if self.vae_split is None or not any(self.vae_split):
            return tuple(range(self.pp))
        return tuple(stage for stage in range(self.pp) if self.vae_split[stage])

    @property
    def decodes_together(self) -> bool:
        """Whether all of them are at the same chunk at once, instead of handing it on."""
        return self.vae_decode == "rows"

    def takes_latents(self, stage: int) -> bool:
        """Whether decoding begins there: on the first of the stages that decode, or on each."""
        return stage == self.decoders[0] or (self.decodes_together and stage in self.decoders)

    def filled(self, cut: Sequence[Cut]) -> ParallelConfig:
        """The config that says what was open: how many text layers and decoder units each stage of the cut has."""
        units = tuple(len(stage.decoder) for stage in cut) if self.vae_decode == "layers" else None
        return replace(self, text_split=tuple(len(stage.text) for stage in cut), vae_split=units)

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
            f"split={shown(list(self.split))}: with split experts its first entries must add up to the {layers} blocks "
            "of an expert, and so must the others."
        )

    def cut(self, layers: int, text_layers: int = 0, decoder_units: int = 0) -> tuple[Cut, ...]:
        """What each stage holds, first to last, of a model of `layers` blocks (each expert's, where it is split).

        Raises:
            InvalidConfig: more stages than blocks, or a split that does not add up.
        """
        text = _stretches("text_split", self.text_split or _evenly(text_layers, self.pp), text_layers)
        decoder = self._decoder_units(decoder_units)
        return tuple(Cut(*of_stage) for of_stage in zip(self.blocks(layers), text, decoder, strict=True))

    def blocks(self, layers: int) -> list[range]:
        """The blocks of each stage, of `layers` (with split experts of as many each).

        Raises:
            InvalidConfig: more stages than blocks, or a split that does not add up.
        """
        return [block for group in self.groups for block in _stretches("split", self._blocks(group, layers), layers)]

    def _blocks(self, group: range, layers: int) -> Sequence[int]:
        stages = len(group)
        if stages > layers:
            raise InvalidConfig(f"pp={stages} is more than the model's {layers} blocks: use at most {layers} stages.")
        return _evenly(layers, stages) if self.split is None else self.split[group.start : group.stop]

    def _decoder_units(self, units: int) -> list[range]:
        if self.vae_decode == "layers":
            return _stretches("vae_split", self.vae_split or _evenly(units, self.pp), units)
        return [range(units if stage in self.decoders else 0) for stage in range(self.pp)]


def _evenly(count: int, stages: int) -> list[int]:
    return [count // stages + (stage < count % stages) for stage in range(stages)]


def _stretches(name: str, sizes: Sequence[int], count: int) -> list[range]:
    """Neighbouring ranges of these sizes, which must add up."""
    if sum(sizes) != count:
        raise InvalidConfig(
            f"{name}={shown(list(sizes))} adds up to {sum(sizes)}, but the model has {count} {UNITS[name]}: "
            "make it add up."
        )
    starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def stages_alone(parallel: ParallelConfig) -> ParallelConfig:
    """The config as it is, for a family of one expert whose blocks run on one rank each.

    Raises:
        InvalidConfig: another axis than pp and cfg divides something, or the picture is to be divided.
    """
    if parallel.lanes > 1 or parallel.expert_placement == "split":
        raise InvalidConfig(f"{parallel}: this model can be divided by pp and cfg alone.")
    if parallel.vae_decode not in ("layers", "tail"):
        raise InvalidConfig(f"vae_decode={shown(parallel.vae_decode)} is not for this model: use layers or tail.")
    return parallel


@dataclass(frozen=True)
class DeviceConfig:
    """What the ranks compute on and in.

    Attributes, beyond what the options' texts say:
        device: a rank takes the one of its local number.
        dtype: of the transformers and the text encoder.
        pin_cores: pin rank r to core r modulo the host's cores (benchmarks).
        allow_untested_device: such as "npu" or "xpu"; nothing of this has been run there.
    """

    device: Annotated[str, "cpu or cuda"] = "cpu"
    dtype: Dtype = "float32"
    vae_dtype: Dtype = "float32"
    text_encoder: Annotated[
        TextEncoder, "resident; reload: in memory only while prompts are encoded; cpu: kept and run there"
    ] = "resident"
    pin_cores: bool = False
    allow_untested_device: Annotated[bool, "Let --device be another of torch's accelerators"] = False
    memory_gb: Annotated[float | None, "GB of each device, which refuses larger requests; as a GPU says of itself"] = (
        None
    )
    compare_weights: Annotated[Compared, "Of several hosts: samples, or content, which reads all of the files"] = (
        "samples"
    )

    def __post_init__(self) -> None:
        if self.device not in DEVICES and not self.allow_untested_device:
            raise InvalidConfig(
                f"device={shown(self.device)} has not been tried: use {' or '.join(DEVICES)}, or "
                "--allow-untested-device."
            )
        for name in ("dtype", "vae_dtype"):
            value = getattr(self, name)
            if value not in get_args(Dtype):
                raise InvalidConfig(f"{name}={shown(value)} is not supported: use {' or '.join(get_args(Dtype))}.")
        if self.text_encoder not in get_args(TextEncoder):
            known = ", ".join(get_args(TextEncoder))
            raise InvalidConfig(f"text_encoder={shown(self.text_encoder)} is not known: use one of {known}.")
        if self.compare_weights not in get_args(Compared):
            known = " or ".join(get_args(Compared))
            raise InvalidConfig(f"compare_weights={shown(self.compare_weights)} is not known: use {known}.")
        if self.memory_gb is not None and self.text_encoder != "resident":
            raise InvalidConfig(
                f"memory_gb={shown(self.memory_gb)} is held against a resident text encoder, not "
                f"text_encoder={shown(self.text_encoder)}: leave one of them out."
            )
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise InvalidConfig(
                f"memory_gb={shown(self.memory_gb)} is no finite number above 0: give GB, or leave it out."
            )

    def rank_environment(self, ranks_on_host: int) -> dict[str, str]:
        """Environment of a rank process, to be set before torch loads.

        `MKL_CBWR` makes MKL's products independent of pointer alignment. On the CPU the host's cores are divided among
        its ranks, a thread each where they are pinned, unless `OMP_NUM_THREADS` says otherwise.

        Raises:
            InvalidConfig: what that says is no number of threads.
        """
        environment = dict(os.environ)
        environment.setdefault("MKL_CBWR", "AUTO")
        if self.device == "cpu":
            threads = 1 if self.pin_cores else max(1, len(os.sched_getaffinity(0)) // ranks_on_host)
            environment["OMP_NUM_THREADS"] = str(asked_threads() or threads)
            environment.setdefault("MKL_NUM_THREADS", environment["OMP_NUM_THREADS"])
        return environment


@dataclass(frozen=True)
class ModelFiles:
    """Files that a model's weights come from instead of its folder, in any naming: docs/files.md.

    Attributes, beyond what the options' texts say: each may be the folder of a sharded component, too.
    """

    transformer: Annotated[Path | None, "The transformer's file, or of two experts the high-noise one's"] = None
    transformer_2: Annotated[Path | None, "The low-noise expert's file"] = None
    vae: Annotated[Path | None, "The VAE's file"] = None
    text_encoder_file: Annotated[Path | None, "The text encoder's file"] = None

    @property
    def given(self) -> dict[str, Path]:
        """Those that there are, by component."""
        named = {
            "transformer": self.transformer,
            "transformer_2": self.transformer_2,
            "vae": self.vae,
            "text_encoder": self.text_encoder_file,
        }
        return {name: Path(path) for name, path in named.items() if path is not None}


def asked_threads() -> int | None:
    """What `OMP_NUM_THREADS` asks for; None where it is not set.

    Raises:
        InvalidConfig: it is no number of threads. It is not passed over, because bits depend on it.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").strip()
    first = given.partition(",")[0].strip()  # OpenMP takes a list, the others of which are for nested regions
    if not given:
        return None
    if not (first.isascii() and first.isdigit() and len(first) < 10 and 1 <= int(first) <= MOST_THREADS):
        raise InvalidConfig(
            f"OMP_NUM_THREADS={given[:20]!r} is no whole number from 1 to {MOST_THREADS}: give the threads of a rank, "
            "or unset it."
        )
    return int(first)
