"""What a family says of its costs, so that a line can be planned and replayed before anything runs (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from cineline.core.config import ParallelConfig, Place
from cineline.core.hardware import Device
from cineline.core.request import Job, Value, WorkItem


class Profile(Protocol):
    """What an item costs, for one division of one model. Lanes of a stage count as one rank, their first."""

    @property
    def parallel(self) -> ParallelConfig:
        """The division, placed: nothing left open."""
        ...

    def expert(self, job: Job, step: int) -> int:
        """Which expert a step needs."""
        ...

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        """A rank's own seconds for an item, with collectives within its stage, and of a decode by rows those of all."""
        ...

    def transfer_s(self, value: Value, item: WorkItem, job: Job) -> float:
        """Seconds of the message in which a value travels that `item` makes."""
        ...

    def resident_bytes(self, place: Place) -> int:
        """Weights and what is always there."""
        ...

    def admitted_bytes(self, place: Place, job: Job) -> int:
        """Held from admission to the request's end on that rank."""
        ...

    def working_bytes(self, place: Place, item: WorkItem, job: Job) -> int:
        """Held while the item runs."""
        ...


class Costs(Protocol):
    """What a model's parts weigh and compute, however it is divided: blocks, layers of the text encoder, units of the
    VAE's decoder.

    Attributes:
        blocks: of each expert. text_layers: how many there are. text_layer_bytes: weights of one.
        decoder_bytes: weights of each unit. decoder_flop: of each unit for a chunk of a picture of the usual size.
    """

    @property
    def blocks(self) -> int: ...
    @property
    def text_layers(self) -> int: ...
    @property
    def text_layer_bytes(self) -> int: ...
    @property
    def decoder_bytes(self) -> Sequence[int]: ...
    @property
    def decoder_flop(self) -> Sequence[int]: ...

    def held_bytes(self, parallel: ParallelConfig, place: Place) -> int:
        """Weights that the rank at `place` holds; of the config nothing is open."""
        ...


class LineCosts(Profile, Protocol):
    """One division of a model on given devices, for requests that are all like one.

    Steps of the same expert take equally long, and so do all chunks between the first one and the last.

    Attributes:
        costs: the model's. devices: of each stage. job: the request.
    """

    @property
    def costs(self) -> Costs: ...
    @property
    def devices(self) -> Sequence[Device]: ...
    @property
    def job(self) -> Job: ...

    def divided(self, parallel: ParallelConfig) -> Self:
        """The same on the same devices, divided in another way."""
        ...

    def peak_bytes(self, place: Place, in_flight: int) -> int:
        """Most bytes held there with so many requests denoising (and one more decoding)."""
        ...

    def block_s(self, stage: int, job: Job) -> float:
        """Seconds of one block in one forward, with what the ranks of the stage exchange."""
        ...

    def block_bytes(self, stage: int) -> int:
        """What a block more makes a rank of the stage hold, of each expert that it has."""
        ...

    def units_s(self, stage: int) -> Sequence[float]:
        """Seconds of each unit of the decoder, for a chunk."""
        ...

    def units_bytes(self, stage: int, units: range) -> int:
        """What these units of the decoder make a stage hold, beyond what its blocks take anyway."""
        ...
