"""Cuts of rows of units over stages: the largest share as small as can be (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def cut_units(
    stages: int,
    units: int,
    cost: Callable[[int, int, int], float],
    both: Callable[[float, float], float] = max,
) -> list[int]:
    """Numbers of units on each stage, in order, so that all of them together cost as little as can be.

    Args:
        cost: of units `start` to `stop` on a stage, called as cost(stage, start, stop).
        both: what two stages cost together: the dearer one, or `operator.add`.
    """
    best = [cost(0, 0, stop) for stop in range(units + 1)]
    cuts: list[list[int]] = [[0] * (units + 1)]
    for stage in range(1, stages):
        row, froms = [], []
        for stop in range(units + 1):
            options = [(both(best[start], cost(stage, start, stop)), start) for start in range(stop + 1)]
            dearest, start = min(options)
            row.append(dearest)
            froms.append(start)
        best = row
        cuts.append(froms)
    return _counts(cuts, units)


def _counts(cuts: Sequence[Sequence[int]], units: int) -> list[int]:
    """Numbers from the starts that each stage chose, last stage first."""
    counts, stop = [], units
    for froms in reversed(cuts):
        start = froms[stop]
        counts.append(stop - start)
        stop = start
    return counts[::-1]


def fill_evenly(base: Sequence[float], unit: float, count: int) -> list[int]:
    """Numbers of equal units on top of what is there, so that the largest sum is as small as can be."""
    given = [0] * len(base)
    for _ in range(count):
        least = min(range(len(base)), key=lambda stage: base[stage] + (given[stage] + 1) * unit)
        given[least] += 1
    return given


def smallest(low: float, high: float, fits: Callable[[float], bool], rounds: int = 40) -> float:
    """About the smallest value between two for which `fits` is true; it is for `high`."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
