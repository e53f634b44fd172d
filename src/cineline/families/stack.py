"""What a line of a family costs whose model is three stacks: blocks between embedders and an output, layers of a text
encoder, units of a decoder (`core.costs`; no torch).

A family says what its stacks weigh, compute and hand on; how a line adds that up is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from cineline.core.config import Dtype, ParallelConfig, Place
from cineline.core.hardware import Device, Link, Rates
from cineline.core.request import Job, Kind, Value, WorkItem
from cineline.core.work import ITEMSIZE, Parameters, Work
from cineline.schedule.words import RECEIVES_AHEAD, SENDS_UNDERWAY

BUFFERS = RECEIVES_AHEAD + 1 + SENDS_UNDERWAY
"""Of a forward edge that comes and one that goes, each as large as its largest message."""


@dataclass(frozen=True)
class Stack:
    """Units that are alike.

    Attributes:
        count: how many. unit: weights of one.
        first, last: of what stands before them, on the head, and behind them, on the tail.
    """

    count: int
    unit: Parameters
    first: Parameters
    last: Parameters

    @property
    def whole(self) -> Parameters:
        return self.unit * self.count + self.first + self.last


@dataclass(frozen=True)
class StackCosts(ABC):
    """A model's weights (`core.costs.Costs`).

    Attributes:
        transformer, text: its stacks. beside: weights on the first rank of the head, in the VAE's dtype or the others'.
        decoder: weights of each unit. before_decoder: of what stands before them.
        dtype, vae_dtype: of transformer and text encoder, and of the VAE.
    """

    transformer: Stack
    text: Stack
    decoder: tuple[Parameters, ...]
    before_decoder: Parameters
    dtype: Dtype
    vae_dtype: Dtype
    beside: Parameters = Parameters()  # noqa: RUF009 (it is frozen)

    @abstractmethod
    def block_shard(self, tp: int) -> Parameters:
        """What one of `tp` ranks holds of a block."""

    @property
    @abstractmethod
    def decoder_flop(self) -> Sequence[int]: ...

    @property
    def blocks(self) -> int:
        return self.transformer.count

    @property
    def text_layers(self) -> int:
        return self.text.count

    @property
    def text_layer_bytes(self) -> int:
        return self.text.unit.nbytes(self.dtype)

    @property
    def decoder_bytes(self) -> Sequence[int]:
        return [unit.nbytes(self.vae_dtype) for unit in self.decoder]

    def held_bytes(self, parallel: ParallelConfig, place: Place) -> int:
        """See `core.costs.Costs`."""
        first, last = place.pp == 0, place.pp == parallel.pp - 1
        blocks = len(parallel.blocks(self.blocks)[place.pp])
        held = blocks * self.block_shard(parallel.tp).nbytes(self.dtype)
        held += self.transformer.first.nbytes(self.dtype) * first + self.transformer.last.nbytes(self.dtype) * last
        if place.is_first_lane:
            assert parallel.text_split is not None
            held += parallel.text_split[place.pp] * self.text_layer_bytes
            held += self.text.first.nbytes(self.dtype) * first + self.text.last.nbytes(self.dtype) * last
            held += self.beside.nbytes(self.dtype) * first
        if place.leads:
            held += sum(self.decoder_bytes[unit] for unit in self.units_on(parallel, place.pp))
            held += self.before_decoder.nbytes(self.vae_dtype) * parallel.takes_latents(place.pp)
        return held

    def units_on(self, parallel: ParallelConfig, stage: int) -> range:
        """The decoder's units there."""
        if parallel.vae_decode != "layers":
            return range(len(self.decoder) if stage in parallel.decoders else 0)
        assert parallel.vae_split is not None
        start = sum(parallel.vae_split[:stage])
        return range(start, start + parallel.vae_split[stage])


@dataclass(frozen=True)
class StackLine(ABC):
    """Seconds and bytes of items on one line (`core.costs.LineCosts`).

    Attributes:
        spec: the model. costs: its weights. parallel: nothing left open. devices: of each stage.
        link: between stages, and between the lanes of one. job: the request that buffers are made for.
    """

    spec: Any
    costs: Any
    parallel: ParallelConfig
    devices: Sequence[Device]
    link: Link
    job: Job

    # What a family says, of a request, per rank of a stage where tp shares a block.

    @abstractmethod
    def block_work(self, job: Job) -> Work: ...
    @abstractmethod
    def block_workspace(self, job: Job) -> int:
        """Most bytes that a block's forward holds beside its weights and its input."""

    @abstractmethod
    def ends_work(self, job: Job) -> tuple[Work, Work]:
        """Before the first block and behind the last one."""

    @abstractmethod
    def condition_work(self, job: Job) -> Work: ...
    @abstractmethod
    def conditioning_bytes(self, job: Job) -> int: ...
    @abstractmethod
    def hidden_bytes(self, job: Job) -> int: ...
    @abstractmethod
    def latent_bytes(self, job: Job) -> int:
        """As they are stepped, in the transformer's dtype."""

    @abstractmethod
    def text_layer_work(self, job: Job) -> Work: ...
    @abstractmethod
    def text_workspace(self, job: Job) -> int: ...
    @abstractmethod
    def text_bytes(self, job: Job) -> int:
        """Hidden states of a prompt between layers of its encoder."""

    @abstractmethod
    def unit_work(self, unit: int, job: Job) -> Work: ...
    @abstractmethod
    def unit_workspace(self, unit: int, job: Job) -> int: ...
    @abstractmethod
    def unit_bytes(self, unit: int, job: Job) -> int:
        """What travels in front of a unit of the decoder."""

    # What follows.

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.costs.dtype]

    @property
    def vae_itemsize(self) -> int:
        return ITEMSIZE[self.costs.vae_dtype]

    @cached_property
    def blocks(self) -> list[int]:
        """On each stage."""
        return [len(blocks) for blocks in self.parallel.blocks(self.costs.blocks)]

    def rates(self, stage: int) -> Rates:
        """Of the stage's device."""
        return self.devices[stage].rates(self.costs.dtype, self.costs.vae_dtype)

    def expert(self, job: Job, step: int) -> int:
        """There is one."""
        return 0

    def branches(self, job: Job) -> int:
        """Forwards a step in each line."""
        return 1 if self.parallel.cfg == 2 else job.branches

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        """See `core.costs.Profile`."""
        stage, rates = place.pp, self.rates(place.pp)
        if item.kind is Kind.TEXT:
            assert self.parallel.text_split is not None
            return rates.seconds(self.text_layer_work(job) * self.parallel.text_split[stage])
        if item.kind is Kind.ENCODE:
            return rates.seconds(self.condition_work(job)) if stage == 0 else 0.0
        if item.kind is Kind.DENOISE:
            before, behind = self.ends_work(job)
            ends = before * (stage == 0) + behind * (stage == self.parallel.pp - 1)
            return self.blocks[stage] * self.block_s(stage, job) + rates.seconds(ends)
        units = self.costs.units_on(self.parallel, stage) if item.kind is Kind.DECODE else ()
        return rates.seconds(sum((self.unit_work(unit, job) for unit in units), Work()))

    def block_s(self, stage: int, job: Job) -> float:
        """See `core.costs.LineCosts`: with tp, two sums of all hidden states."""
        seconds, ranks = self.rates(stage).seconds(self.block_work(job)), self.parallel.tp
        link = self.link.between(self.devices[stage])
        share = 2 * (ranks - 1) / ranks
        return seconds + (2 * link.seconds(share * self.hidden_bytes(job)) if ranks > 1 else 0.0)

    def transfer_s(self, value: Value, item: WorkItem, job: Job) -> float:
        """See `core.costs.Profile`."""
        return self.link.between(*self.devices).seconds(self.message_bytes(value, item, job))

    def message_bytes(self, value: Value, item: WorkItem, job: Job) -> int:
        """What travels; of a decode's the largest one."""
        match value:
            case Value.EMBEDDING | Value.TEXT:
                return self.text_bytes(job)
            case Value.CONDITIONING:
                return self.conditioning_bytes(job)
            case Value.HIDDEN:
                return self.hidden_bytes(job)
            case Value.CHUNK:
                starts = [units.start for units in self._units[1:] if units]
                return max((self.unit_bytes(start, job) for start in starts), default=0)
            case _:
                return self.latent_bytes(job)

    @property
    def _units(self) -> list[range]:
        return [self.costs.units_on(self.parallel, stage) for stage in range(self.parallel.pp)]

    def resident_bytes(self, place: Place) -> int:
        """Weights, edges' buffers, and what the device keeps for itself."""
        edges = 0
        if self.parallel.pp > 1:
            edges = self.hidden_bytes(self.job) + (self.text_bytes(self.job) if place.is_first_lane else 0)
            units = self._units[place.pp]
            if self.job.chunks and place.leads and units and units.start:
                edges += self.unit_bytes(units.start, self.job)
        held: int = self.costs.held_bytes(self.parallel, place)
        return held + self.devices[place.pp].reserved + BUFFERS * edges

    def admitted_bytes(self, place: Place, job: Job) -> int:
        """Conditioning, what turns queries and keys (taken for as much as hidden states), latents on the ends."""
        ends = (place.pp == 0) + (place.pp == self.parallel.pp - 1)
        return self.conditioning_bytes(job) + self.hidden_bytes(job) + 3 * ends * self.latent_bytes(job)

    def working_bytes(self, place: Place, item: WorkItem, job: Job) -> int:
        """See `core.costs.Profile`."""
        if item.kind is Kind.TEXT and place.is_first_lane:
            return self.text_workspace(job)
        if item.kind is Kind.DENOISE:
            return self.block_workspace(job)
        if item.kind is Kind.DECODE and place.leads:
            return max((self.unit_workspace(unit, job) for unit in self._units[place.pp]), default=0)
        return 0

    def peak_bytes(self, place: Place, in_flight: int) -> int:
        """See `core.costs.LineCosts`."""
        job, kinds = self.job, (Kind.TEXT, Kind.DENOISE, *((Kind.DECODE,) if self.job.chunks else ()))
        working = max(self.working_bytes(place, WorkItem(kind, 0), job) for kind in kinds)
        requests = in_flight + (1 if job.chunks else 0)
        return self.resident_bytes(place) + requests * self.admitted_bytes(place, job) + working

    def divided(self, parallel: ParallelConfig) -> Self:
        """See `core.costs.LineCosts`."""
        return replace(self, parallel=parallel)

    def block_bytes(self, stage: int) -> int:
        """See `core.costs.LineCosts`."""
        return self.costs.block_shard(self.parallel.tp).nbytes(self.costs.dtype)  # type: ignore[no-any-return]

    def units_s(self, stage: int) -> Sequence[float]:
        """See `core.costs.LineCosts`."""
        rates = self.rates(stage)
        return [rates.seconds(self.unit_work(unit, self.job)) for unit in range(len(self.costs.decoder))]

    def units_bytes(self, stage: int, units: range) -> int:
        """See `core.costs.LineCosts`."""
        held = sum(self.costs.decoder_bytes[unit] for unit in units)
        block = self.block_workspace(self.job)
        working = max((max(self.unit_workspace(unit, self.job) - block, 0) for unit in units), default=0)
        coming = BUFFERS * self.unit_bytes(units.start, self.job) if stage and units else 0
        total: int = held + working + coming
        return total
