"""The cut of every component for one set of axes on given devices (no torch).

Blocks go where the busiest stage is least busy, the decoder's units by time or, where memory is short, by memory;
text layers, which take hardly any time, fill up the memory that is left.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cineline.core.config import Place, VaeDecode
from cineline.core.costs import LineCosts
from cineline.planning.alike import Alike
from cineline.planning.balance import cut_units, fill_evenly, smallest
from cineline.planning.bound import busy_s, lined_branches, steps_of

DECODES: tuple[VaeDecode, ...] = ("layers", "tail")
"""Exact ways to decode, tried first."""


@dataclass(frozen=True)
class Fit:
    """A line whose cut is settled.

    Attributes:
        line: its costs. in_flight: M.
        excess: bytes by which its largest stage is above what it may hold; 0 where it fits.
    """

    line: LineCosts
    in_flight: int
    excess: float

    def peaks(self) -> list[int]:
        """Bytes on each stage's first rank."""
        return [self.line.peak_bytes(Place(pp=stage), self.in_flight) for stage in range(self.line.parallel.pp)]


def fits(line: LineCosts, in_flight: int, limits: Sequence[float], ways: Sequence[VaeDecode]) -> Iterator[Fit]:
    """A cut for each way to decode, whether it fits or not.

    Args:
        line: its axes and devices; its splits do not count.
        limits: bytes that each stage may hold.
    """
    for way in ways:
        for decoder in _decoder_cuts(line, way, limits):
            yield _settle(_with(line, vae_decode=way, vae_split=decoder), in_flight, limits)


def _with(line: LineCosts, **changes: object) -> LineCosts:
    return line.divided(replace(line.parallel, **changes))  # type: ignore[arg-type]


def _decoder_cuts(line: LineCosts, way: VaeDecode, limits: Sequence[float]) -> Iterator[tuple[int, ...] | None]:
    stages, units = line.parallel.pp, len(line.costs.decoder_bytes)
    if way != "layers":
        yield None
    elif stages == 1:
        yield (units,)
    else:
        seconds = [line.units_s(stage) for stage in range(stages)]
        by_time = cut_units(stages, units, lambda stage, start, stop: sum(seconds[stage][start:stop]))
        # Text layers fill up what the decoder leaves, so that its bytes in all count, too.
        held = {
            (stage, start, stop): line.units_bytes(stage, range(start, stop))
            for stage in range(stages)
            for stop in range(units + 1)
            for start in range(stop + 1)
        }
        by_memory = cut_units(stages, units, lambda *share: held[share] / limits[share[0]])
        in_all = cut_units(stages, units, lambda *share: held[share], both=operator.add)
        tail = (0,) * (stages - 1) + (units,)  # `vae_decode="tail"` does that without a detour
        yield from (cut for cut in dict.fromkeys(map(tuple, (by_time, by_memory, in_all))) if cut != tail)


def _settle(line: LineCosts, in_flight: int, limits: Sequence[float]) -> Fit:
    """Blocks and text layers, with the decoder's cut as it is."""
    stages, layers, texts = line.parallel.pp, line.costs.blocks, line.costs.text_layers
    start = _with(line, split=None, text_split=(0,) * stages)
    costs, job = Alike(start), line.job
    block = [line.block_bytes(stage) for stage in range(stages)]
    block_s = [_seconds_a_block(start, stage) for stage in range(stages)]
    more = [len(blocks) - 1 for blocks in start.parallel.blocks(layers)]  # than one on each stage
    base = [start.peak_bytes(Place(pp=stage), in_flight) - more[stage] * block[stage] for stage in range(stages)]
    busy = [busy_s(costs, job, stage) - more[stage] * block_s[stage] for stage in range(stages)]
    layer = line.costs.text_layer_bytes
    blocks: list[int] = []
    for group in line.parallel.groups:
        span = slice(group.start, group.stop)
        own = _Group(base[span], busy[span], block_s[span], block[span], limits[span])
        blocks += own.blocks(layers, layer, texts * len(group) // stages)
    held = [base[stage] + (blocks[stage] - 1) * block[stage] - limits[stage] for stage in range(stages)]
    settled = _with(line, split=tuple(blocks), text_split=tuple(fill_evenly(held, layer, texts)))
    excess = max(
        settled.peak_bytes(Place(pp=stage), in_flight) - limit
        for stage, limit in zip(range(stages), limits, strict=True)
    )
    return Fit(settled, in_flight, max(0.0, excess))


def _seconds_a_block(line: LineCosts, stage: int) -> float:
    """What one block more costs a stage, for a request."""
    steps = sum(number for expert, number in steps_of(line, line.job).items() if stage in line.parallel.route(expert))
    return lined_branches(line, line.job) * steps * line.block_s(stage, line.job)


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
