"""One division of one Wan model on given devices: what each item costs there (`core.costs.LineCosts`; no torch)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

from cineline.core.config import ParallelConfig, Place
from cineline.core.request import Job, Kind, WorkItem
from cineline.families.wan.costs.seconds import HISTORY, TimedLine
from cineline.families.wan_vae.constants import TILE
from cineline.schedule.words import RECEIVES_AHEAD, SENDS_UNDERWAY

RECEIVE_BUFFERS = RECEIVES_AHEAD + 1
"""Of an edge, each as large as its largest message; so are the sends that are not finished."""


@dataclass(frozen=True)
class PlannedLine(TimedLine):
    """Seconds and bytes of items on one line."""

    def resident_bytes(self, place: Place) -> int:
        """Weights, edges' buffers, the caches of one decode, and what the device keeps for itself."""
        held = self.costs.held(self.parallel, place).total + self.devices[place.pp].reserved
        return held + self.buffer_bytes(place) + self.cache_bytes(place)

    def buffer_bytes(self, place: Place) -> int:
        """Of the forward edges: on each, receives that are posted ahead or sends that are not finished, as large as its
        largest message. Where a chain goes past a stage, that is one more edge."""
        coming: dict[int, int] = defaultdict(int)
        going: dict[int, int] = defaultdict(int)
        for item, stages in self._chains(place):
            for source, target in pairwise(stages):
                nbytes = self.forward_bytes(target, item, self.job)
                if target == place.pp:
                    coming[source] = max(coming[source], nbytes)
                if source == place.pp:
                    going[target] = max(going[target], nbytes)
        return RECEIVE_BUFFERS * sum(coming.values()) + SENDS_UNDERWAY * sum(going.values())

    def _chains(self, place: Place) -> Iterator[tuple[WorkItem, Sequence[int]]]:
        """The items that are handed on over the edges of that rank's lane, with their stages."""
        yield WorkItem(Kind.TEXT, 0), self.parallel.encoders
        yield from ((WorkItem(Kind.DENOISE, 0), group) for group in self.parallel.groups)
        if self.job.chunks and place.leads and not self.parallel.decodes_together:
            yield WorkItem(Kind.DECODE, 0, 1), self.parallel.decoders

    def cache_bytes(self, place: Place) -> int:
        """The decoder's feature caches."""
        if not self.job.chunks or not place.leads:
            return 0
        units = self.costs.units_on(self.parallel, place.pp)
        caches: int = sum(unit.cache_bytes(self._decoded_cells(self.job), self.vae_itemsize) for unit in units)
        return caches // self._row_shares

    def _decoded_cells(self, job: Job) -> int:
        """H' x W' that are decoded at once."""
        tiled = self.parallel.vae_decode == "tiled"
        return min(self.cells(job), (TILE // self.spec.vae_scale) ** 2) if tiled else self.cells(job)

    @property
    def _row_shares(self) -> int:
        return len(self.parallel.decoders) if self.parallel.decodes_together else 1

    def admitted_bytes(self, place: Place, job: Job) -> int:
        """Conditioning, rope, and on a route's ends the latents, on its last stage with the solver's history and where
        steps are skipped the residuals."""
        model, latents = self.costs.transformer, self.latent_bytes(job)
        held = self.conditioning_bytes(job) + 2 * self.own_tokens(job) * model.width // model.heads * 4
        starts, ends = {group.start for group in self.parallel.groups}, {group.stop for group in self.parallel.groups}
        if place.pp in starts:
            held += 2 * latents + self.beside_bytes(job)
        if place.pp + 1 in ends:
            held += latents * (2 + HISTORY) + 2 * latents * self.itemsize // 4
            held += self.branches(job) * self.hidden_bytes(job) if job.skipped else 0
        return held

    def working_bytes(self, place: Place, item: WorkItem, job: Job) -> int:
        """Activations of an item."""
        model, own = self.costs.transformer, self.own_tokens(job)
        if item.kind is Kind.TEXT:
            return self.costs.text.layer_workspace(self.itemsize)
        if item.kind is Kind.DENOISE:
            ends = {group.stop - 1 for group in self.parallel.groups} if job.skipped else set()
            embeds = place.pp in ends | {group.start for group in self.parallel.groups}
            embedded = self.hidden_bytes(job) if embeds else 0
            return embedded + model.block_workspace(own, self.itemsize, self.per_token(job), self.parallel.tp)
        if item.kind is Kind.ENCODE and job.has_image and place.pp == 0:
            chunks = 1 if self.spec.kind == "ti2v" else self.spec.latent_shape(job)[2]
            return self.costs.vae.encode_workspace(self.cells(job), chunks, self.vae_itemsize)
        if item.kind is Kind.DECODE and place.leads:
            return self._decode_workspace(place, item, job)
        return 0

    def _decode_workspace(self, place: Place, item: WorkItem, job: Job) -> int:
        cells, size = self._decoded_cells(job), self.vae_itemsize
        units = self.costs.units_on(self.parallel, place.pp)
        most: int = max((unit.workspace(cells, item.number == 0, size) for unit in units), default=0)
        return most // self._row_shares

    def peak_bytes(self, place: Place, in_flight: int) -> int:
        """Most bytes held there with so many requests denoising (and one more decoding)."""
        job = self.job
        items = [WorkItem(Kind.TEXT, 0), WorkItem(Kind.ENCODE, 0), WorkItem(Kind.DENOISE, 0)]
        items += [WorkItem(Kind.DECODE, 0, 1)] if job.chunks else []
        working = max(self.working_bytes(place, item, job) for item in items)
        requests = in_flight + (1 if job.chunks else 0)
        return self.resident_bytes(place) + requests * self.admitted_bytes(place, job) + working

    # What a cut is chosen by.

    def divided(self, parallel: ParallelConfig) -> Self:
        """See `LineCosts.divided`."""
        return replace(self, parallel=parallel)

    def block_bytes(self, stage: int) -> int:
        """Of one rank."""
        shard = self.costs.transformer.block_shard(self.parallel.tp).nbytes(self.costs.dtype)
        return self.costs.experts_on(self.parallel, stage) * shard

    def units_s(self, stage: int) -> Sequence[float]:
        """For a chunk that is not the first."""
        rates, cells = self.rates(stage), self.cells(self.job)
        return [rates.seconds(unit.work(cells, False, self.vae_itemsize)) for unit in self.costs.vae.decoder]

    def units_bytes(self, stage: int, units: range) -> int:
        """Weights, caches, and what comes, goes and is held above what blocks take anyway."""
        own = [self._decoder_bytes[unit] for unit in units]
        coming = RECEIVE_BUFFERS * self._beyond_hidden[units.start] if stage else 0
        going = SENDS_UNDERWAY * self._beyond_hidden[units.stop] if stage < self.parallel.pp - 1 else 0
        held, working = sum(held for held, _ in own), max((working for _, working in own), default=0)
        return held + working + coming + going

    @cached_property
    def _decoder_bytes(self) -> list[tuple[int, int]]:
        """Of each unit: what it always holds, and what it holds while it runs beyond what a block does."""
        cells, size = self.cells(self.job), self.vae_itemsize
        block = self.costs.transformer.block_workspace(self.own_tokens(self.job), self.itemsize)
        return [
            (
                unit.parameters.nbytes(self.costs.vae_dtype) + unit.cache_bytes(cells, size),
                max(unit.workspace(cells, False, size) - block, 0),
            )
            for unit in self.costs.vae.decoder
        ]

    @cached_property
    def _beyond_hidden(self) -> list[int]:
        """Bytes that travel in front of each unit, and behind the last one, beyond those of hidden states."""
        vae, cells, size = self.costs.vae, self.cells(self.job), self.vae_itemsize
        travel = [vae.boundary_bytes(unit, cells, False, size) for unit in range(len(vae.decoder) + 1)]
        return [max(nbytes - self.hidden_bytes(self.job), 0) for nbytes in travel]
