"""The cut of every component for one set of axes on given devices (no torch).

Blocks go where the busiest stage is least busy, the decoder's units by time or, where memory is short, by memory;
text layers, which take hardly any time, fill up the memory that is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cineline.core.config import Place, VaeDecode
from cineline.core.costs import LineCosts
from cineline.planning.alike import Alike
from cineline.planning.balance import Row, Shares, cut_units, fill_evenly, sums
from cineline.planning.bound import busy_s, forwards_of, steps_of

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
        by_time = [sums(line.units_s(stage)) for stage in range(stages)]
        # Text layers fill up what the decoder leaves, so that its bytes in all count, too.
        held = [_units_bytes(line, stage) for stage in range(stages)]
        by_memory = [nbytes / limit for nbytes, limit in zip(held, limits, strict=True)]
        cuts = cut_units(by_time), cut_units(by_memory), cut_units(held, np.add)
        tail = (0,) * (stages - 1) + (units,)  # `vae_decode="tail"` does that without a detour
        yield from (cut for cut in dict.fromkeys(tuple(counts) for _, counts in cuts) if cut != tail)


def _units_bytes(line: LineCosts, stage: int) -> Shares:
    units = len(line.costs.decoder_bytes)
    held = np.full((units + 1, units + 1), np.inf)
    for start, stop in zip(*np.triu_indices(units + 1), strict=True):
        held[start, stop] = line.units_bytes(stage, range(start, stop))
    return held


def _settle(line: LineCosts, in_flight: int, limits: Sequence[float]) -> Fit:
    """Blocks and text layers, with the decoder's cut as it is."""
    stages, layers, texts = line.parallel.pp, line.costs.blocks, line.costs.text_layers
    start = _with(line, split=None, text_split=(0,) * stages)
    costs, job = Alike(start), line.job
    block = [line.block_bytes(stage) for stage in range(stages)]
    block_s = [_seconds_a_block(start, stage) for stage in range(stages)]
    more = [len(blocks) - 1 for blocks in start.parallel.blocks(layers)]  # than one on each stage
    above = [
        start.peak_bytes(Place(pp=stage), in_flight) - more[stage] * block[stage] - limits[stage]
        for stage in range(stages)
    ]
    busy = [busy_s(costs, job, stage) - more[stage] * block_s[stage] for stage in range(stages)]
    # A row of the experts' blocks, one after the other where they are split; each stage has one of them at least.
    free = [layers - len(group) for group in line.parallel.groups]
    of_group = [_only(free, number) for number, group in enumerate(line.parallel.groups) for _ in group]
    row = Row(
        base=above,
        nbytes=[sums([block[stage]] * sum(free)) + of_group[stage] for stage in range(stages)],
        work=[sums([block_s[stage]] * sum(free)) + of_group[stage] + busy[stage] for stage in range(stages)],
        piece=line.costs.text_layer_bytes,
        pieces=texts,
    )
    work = row.least_work(0.0)
    cut = row.cut(row.least_above(work, 0.0 if work < np.inf else None), work)
    assert cut is not None
    blocks = [1 + count for count in cut]
    held = [above[stage] + (blocks[stage] - 1) * block[stage] for stage in range(stages)]
    settled = _with(line, split=tuple(blocks), text_split=tuple(fill_evenly(held, row.piece, texts)))
    excess = max(
        settled.peak_bytes(Place(pp=stage), in_flight) - limit
        for stage, limit in zip(range(stages), limits, strict=True)
    )
    return Fit(settled, in_flight, max(0.0, excess))


def _only(counts: Sequence[int], number: int) -> Shares:
    """Of neighbouring parts of a row, 0 for units that are all of one of them, infinite for others."""
    units, start = sum(counts), sum(counts[:number])
    found = np.full((units + 1, units + 1), np.inf)
    inside = slice(start, start + counts[number] + 1)
    found[inside, inside] = 0.0
    return found


def _seconds_a_block(line: LineCosts, stage: int) -> float:
    """What one block more costs a stage, for a request."""
    forwards = sum(
        number * forwards_of(line, line.job, expert)
        for (expert, skipped), number in steps_of(line, line.job).items()
        if stage in line.parallel.route(expert) and not skipped
    )
    return forwards * line.block_s(stage, line.job)
