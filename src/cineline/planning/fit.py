"""The cut of every component for one set of axes on given devices (no torch).

Blocks go where the busiest stage is least busy, the decoder's units by time or, where memory is short, by memory;
text layers, which take hardly any time, fill up the memory that is left.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cineline.core.config import Place, VaeDecode
from cineline.planning.balance import cut_units, fill_evenly, smallest
from cineline.planning.forecast import busy_s
from cineline.planning.line import RECEIVE_BUFFERS, PlannedLine
from cineline.schedule.words import SENDS_UNDERWAY

DECODES: tuple[VaeDecode, ...] = ("layers", "tail")
"""Exact ways to decode, tried first."""


@dataclass(frozen=True)
class Fit:
    """A line whose cut is settled.

    Attributes:
        line: its costs. in_flight: M.
        excess: bytes by which its largest stage is above what it may hold; 0 where it fits.
    """

    line: PlannedLine
    in_flight: int
    excess: float

    def peaks(self) -> list[int]:
        """Bytes on each stage's first rank."""
        return [self.line.peak_bytes(Place(pp=stage), self.in_flight) for stage in range(self.line.parallel.pp)]


def fits(line: PlannedLine, in_flight: int, limits: Sequence[float], ways: Sequence[VaeDecode]) -> Iterator[Fit]:
    """A cut for each way to decode, whether it fits or not.

    Args:
        line: its axes and devices; its splits do not count.
        limits: bytes that each stage may hold.
    """
    for way in ways:
        for decoder in _decoder_cuts(line, way, limits):
            yield _settle(_with(line, vae_decode=way, vae_split=decoder), in_flight, limits)


def _with(line: PlannedLine, **changes: object) -> PlannedLine:
    return replace(line, parallel=replace(line.parallel, **changes))  # type: ignore[arg-type]


def _decoder_cuts(line: PlannedLine, way: VaeDecode, limits: Sequence[float]) -> Iterator[tuple[int, ...] | None]:
    stages, units = line.parallel.pp, line.costs.vae.decoder
    if way != "layers":
        yield None
    elif stages == 1:
        yield (len(units),)
    else:
        cells, size = line.cells(line.job), line.vae_itemsize
        works = [unit.work(cells, False, size) for unit in units]
        seconds = [[line.rates(stage).seconds(work) for work in works] for stage in range(stages)]
        by_time = cut_units(stages, len(units), lambda stage, start, stop: sum(seconds[stage][start:stop]))
        # Text layers fill up what the decoder leaves, so that its bytes in all count, too.
        bytes_of = _decoder_bytes(line)
        by_memory = cut_units(stages, len(units), lambda *share: bytes_of(*share) / limits[share[0]])
        in_all = cut_units(stages, len(units), bytes_of, both=operator.add)
        tail = (0,) * (stages - 1) + (len(units),)  # `vae_decode="tail"` does that without a detour
        yield from (cut for cut in dict.fromkeys(map(tuple, (by_time, by_memory, in_all))) if cut != tail)


def _decoder_bytes(line: PlannedLine) -> Callable[[int, int, int], float]:
    """Of a share of the decoder (stage, first unit, last + 1): weights, caches, and what comes, goes and is held above
    what blocks take anyway."""
    vae, cells, size = line.costs.vae, line.cells(line.job), line.vae_itemsize
    units, last = vae.decoder, line.parallel.pp - 1
    held = [unit.parameters.nbytes(line.costs.vae_dtype) + unit.cache_bytes(cells, size) for unit in units]
    block = line.costs.transformer.block_workspace(line.own_tokens(line.job), line.itemsize)
    working = [max(unit.workspace(cells, False, size) - block, 0) for unit in units]
    hidden = line.hidden_bytes(line.job)
    travels = [max(vae.boundary_bytes(unit, cells, False, size) - hidden, 0) for unit in range(len(units) + 1)]

    def cost(stage: int, start: int, stop: int) -> float:
        coming = RECEIVE_BUFFERS * travels[start] if stage else 0
        going = SENDS_UNDERWAY * travels[stop] if stage < last else 0
        return sum(held[start:stop]) + max(working[start:stop], default=0) + coming + going

    return cost


def _settle(line: PlannedLine, in_flight: int, limits: Sequence[float]) -> Fit:
    """Blocks and text layers, with the decoder's cut as it is."""
    stages, layers = line.parallel.pp, line.costs.transformer.layers
    start = _with(line, split=None, text_split=(0,) * stages)
    shard = line.costs.transformer.block_shard(line.parallel.tp).nbytes(line.costs.dtype)
    block = [line.costs.experts_on(line.parallel, stage) * shard for stage in range(stages)]
    block_s = [_seconds_a_block(start, stage) for stage in range(stages)]
    more = [blocks - 1 for blocks in start.blocks]  # than one on each stage
    base = [start.peak_bytes(Place(pp=stage), in_flight) - more[stage] * block[stage] for stage in range(stages)]
    busy = [busy_s(start, stage, line.job) - more[stage] * block_s[stage] for stage in range(stages)]
    layer = line.costs.text.layer.nbytes(line.costs.dtype)
    blocks: list[int] = []
    for group in line.parallel.groups:
        span = slice(group.start, group.stop)
        own = _Group(base[span], busy[span], block_s[span], block[span], limits[span])
        blocks += own.blocks(layers, layer, line.costs.text.layers * len(group) // stages)
    held = [base[stage] + (blocks[stage] - 1) * block[stage] - limits[stage] for stage in range(stages)]
    texts = fill_evenly(held, layer, line.costs.text.layers)
    settled = _with(line, split=tuple(blocks), text_split=tuple(texts))
    excess = max(
        settled.peak_bytes(Place(pp=stage), in_flight) - limit
        for stage, limit in zip(range(stages), limits, strict=True)
    )
    return Fit(settled, in_flight, max(0.0, excess))


def _seconds_a_block(line: PlannedLine, stage: int) -> float:
    """What one block more costs a stage, for a request."""
    job, high = line.job, line.spec.high_steps(line.job)
    steps = job.steps
    if line.parallel.expert_placement == "split":
        steps = high if stage in line.parallel.groups[0] else job.steps - high
    return line.branches(job) * steps * line.block_s(stage, job)


@dataclass(frozen=True)
class _Group:
    """Stages that share an expert's blocks out, with one block each so far.

    Attributes:
        base: bytes on each. busy: seconds a request. block_s, block: of one block more. limits: bytes allowed.
    """

    base: Sequence[float]
    busy: Sequence[float]
    block_s: Sequence[float]
    block: Sequence[int]
    limits: Sequence[float]

    def blocks(self, layers: int, text_layer: int, text_layers: int) -> list[int]:
        """Numbers of blocks: the least busy that memory has room for, beside the text layers of these stages.

        Where there is no room for all, memory alone decides.
        """
        stages = range(len(self.base))
        most = max(self.busy[stage] + layers * self.block_s[stage] for stage in stages)

        def counts(limit: float) -> list[int]:
            # A block takes no time where the expert has no step.
            more = [max(0.0, limit - self.busy[stage]) for stage in stages]
            by_time = [
                1 + int(more[stage] / self.block_s[stage]) if self.block_s[stage] else layers for stage in stages
            ]
            return [min(by_time[stage], self._room(stage)) for stage in stages]

        def enough(limit: float) -> bool:
            found = counts(limit)
            return sum(found) >= layers and self._has_text_room(found, layers, text_layer, text_layers)

        if not enough(most):
            return self._by_memory(layers)
        return self._reduced(counts(smallest(0.0, most, enough)), layers)

    def _room(self, stage: int) -> int:
        """Blocks that fit, at least the one that is there."""
        return 1 + max(0, int((self.limits[stage] - self.base[stage]) // self.block[stage]))

    def _left(self, stage: int, blocks: int) -> float:
        return self.limits[stage] - self.base[stage] - (blocks - 1) * self.block[stage]

    def _has_text_room(self, counts: Sequence[int], layers: int, text_layer: int, text_layers: int) -> bool:
        reduced = self._reduced(list(counts), layers)
        return sum(max(0, int(self._left(stage, blocks) // text_layer)) for stage, blocks in enumerate(reduced)) >= (
            text_layers
        )

    def _reduced(self, counts: list[int], layers: int) -> list[int]:
        """As many as there are: taken from where the least memory is left."""
        while sum(counts) > layers:
            movable = [stage for stage, blocks in enumerate(counts) if blocks > 1]
            counts[min(movable, key=lambda stage: self._left(stage, counts[stage]))] -= 1
        return counts

    def _by_memory(self, layers: int) -> list[int]:
        counts = [1] * len(self.base)
        while sum(counts) < layers:
            counts[max(range(len(counts)), key=lambda stage: self._left(stage, counts[stage] + 1))] += 1
        return counts
