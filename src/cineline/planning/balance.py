"""The cutter: rows of units (blocks, the decoder's) over stages, beside text layers, which go where there is room.

Legend: P stages, U units (numpy, no torch).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Shares = NDArray[np.float64]
"""What the units from `start` to before `stop` cost, [start, stop], [U + 1, U + 1]; infinite where they cannot be."""


def sums(values: Sequence[float]) -> Shares:
    """Of the values of the units, one for each."""
    up_to = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    found: Shares = up_to[None, :] - up_to[:, None]
    found[np.tril_indices(len(up_to), -1)] = np.inf
    return found


def cut_units(costs: Sequence[Shares], both: np.ufunc = np.maximum) -> tuple[float, list[int]]:
    """The cut that costs as little as can be: what it costs, and the numbers of units on each stage, in order.

    Where several cost the same, the later stages get as many units as they can.

    Args:
        costs: of each stage.
        both: what two stages cost together: the dearer one, or `np.add`.
    """
    best, froms = costs[0][0], []
    for cost in costs[1:]:
        together = both(best[:, None], cost)
        froms.append(together.argmin(axis=0))
        best = together.min(axis=0)
    ends = [len(best) - 1]
    for starts in reversed(froms):
        ends.append(int(starts[ends[-1]]))
    return float(best[-1]), [stop - start for start, stop in zip([0, *ends[:0:-1]], ends[::-1], strict=True)]


@dataclass(frozen=True)
class Row:
    """Units that are to be shared out in order, and equal pieces beside them that any stage may have.

    Attributes:
        base: bytes that each stage holds without them, above what it may hold (so most are negative).
        nbytes: of the units, by stage. work: what a stage has to do, its other work included, by stage.
        piece: bytes of a piece. pieces: how many must find room.
    """

    base: Sequence[float]
    nbytes: Sequence[Shares]
    work: Sequence[Shares]
    piece: int
    pieces: int

    def cut(self, above: float, work: float) -> list[int] | None:
        """Units on each stage so that none holds more than it may and `above`, or works more; None if there is no way.

        The one that leaves most room for pieces.
        """
        costs = []
        for base, nbytes, busy in zip(self.base, self.nbytes, self.work, strict=True):
            left = above - base - nbytes
            pieces = np.floor(left / self.piece) if self.pieces else np.zeros_like(left)
            costs.append(np.where((left < 0) | (busy > work), np.inf, -pieces))
        room, counts = cut_units(costs, np.add)
        return counts if -room >= self.pieces else None

    def least_work(self, above: float) -> float:
        """The smallest work of the busiest stage; infinite where not even that is enough."""
        values = np.unique(np.concatenate([busy[np.isfinite(busy)] for busy in self.work])).tolist()
        place = bisect_left(values, True, key=lambda work: self.cut(above, work) is not None)
        return float(values[place]) if place < len(values) else np.inf

    def least_above(self, work: float, above: float | None = None) -> float:
        """About the smallest `above` that is enough with that work; `above`, where it is given, is."""
        if above is None:
            units = sum(float(nbytes[np.isfinite(nbytes)].max()) for nbytes in self.nbytes)
            above = max(self.base) + units + self.piece * self.pieces
        return smallest(min(self.base), above, lambda limit: self.cut(limit, work) is not None)


def fill_evenly(base: Sequence[float], unit: float, count: int) -> list[int]:
    """Numbers of equal units on top of what is there, so that the largest sum is as small as can be."""
    given = [0] * len(base)
    for _ in range(count):
        least = min(range(len(base)), key=lambda stage: base[stage] + (given[stage] + 1) * unit)
        given[least] += 1
    return given


def smallest(low: float, high: float, fits: Callable[[float], bool], rounds: int = 24) -> float:
    """About the smallest value between two for which `fits` is true; it is for `high`."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
