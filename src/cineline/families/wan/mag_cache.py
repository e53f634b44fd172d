"""MagCache (Ma et al. 2025, arXiv 2506.09045): which steps of a request are skipped (no torch).

A block's residual, what all blocks add to their input, changes from step to step by a ratio that hardly depends on the
prompt. So it is measured once (`cineline calibrate-cache`), and says of every request which steps may add the residual
of an earlier one instead of computing theirs. As in diffusers (`hooks/mag_cache.py`), number for number in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from cineline.families.wan.job import WanJob

Ratios = tuple[float, ...]
"""Of each step's residual to the step's before it, by norms."""

MOST_SKIPPED = 3
"""Steps in a row, K."""

RETAINED = 0.2
"""Share of an expert's steps, its first ones, that are never skipped."""


def skipped_by(job: WanJob, experts: Sequence[int]) -> tuple[int, ...]:
    """The steps that a job skips, whose steps are of these experts."""
    if job.cache is None or job.ratios is None:
        return ()
    return skipped_steps(job.ratios, float(job.cache.removeprefix("mag:")), experts)


def skipped_steps(ratios: Sequence[Ratios], threshold: float, experts: Sequence[int]) -> tuple[int, ...]:
    """The steps that are skipped.

    Args:
        ratios: of each expert. experts: of each step; each counts its own, and begins with a computed one.
    """
    found: list[int] = []
    for expert in set(experts):
        steps = [step for step, own in enumerate(experts) if own == expert]
        found += (steps[at] for at in _skipped(interpolated(ratios[expert], len(steps)), threshold))
    return tuple(sorted(found))


def interpolated(ratios: Ratios, steps: int) -> NDArray[np.float32]:
    """The ratios of so many steps: of each that of the nearest one."""
    measured = np.array(ratios, dtype=np.float32)
    if len(measured) == steps:
        return measured
    if steps == 1:
        return measured[-1:]
    scale = np.float32((len(measured) - 1) / (steps - 1))
    nearest: NDArray[np.int64] = np.rint(np.arange(steps, dtype=np.float32) * scale).astype(np.int64)
    return measured[nearest]


def _skipped(ratios: NDArray[np.float32], threshold: float) -> Iterator[int]:
    """Numbers of those that are."""
    one, limit = np.float32(1), np.float32(threshold)
    ratio, error, count = one, np.float32(0), 0
    for step in range(int(RETAINED * len(ratios) + 0.5), len(ratios)):
        ratio, count = ratio * ratios[step], count + 1
        error = error + abs(one - ratio)
        if step > 0 and error <= limit and count <= MOST_SKIPPED:
            yield step
        else:
            ratio, error, count = one, np.float32(0), 0
