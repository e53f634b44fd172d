"""Measures a model's ratios for MagCache (`families.wan.mag_cache`) with the engine: one line, nothing skipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cineline.core.config import ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.errors import InvalidRequest, shown
from cineline.families.wan.calibrating import CalibratingSpec
from cineline.families.wan.ratios import BRANCHES, Measured
from cineline.families.wan.spec import WanSpec

PROMPTS = (
    "A cat runs across a meadow and looks into the camera",
    "A city street at night in the rain, cars pass by",
    "A red circle moves right on a white background",
    "An old sailor tells a story by a fire, close up",
)
"""Where none is given. Ratios hardly depend on the prompt."""

WAIT_LIMIT_S = 24 * 3600.0
"""For one prompt; a real model on a CPU takes hours."""


def calibrate(
    spec: WanSpec,
    parallel: ParallelConfig,
    prompts: Sequence[str],
    fields: Mapping[str, Any],
    options: Mapping[str, Any],
    tell: Callable[[str], None],
) -> dict[str, Measured]:
    """Ratios by expert and branch, the mean over the prompts, the first of which has seed 0, the next 1, and so on.

    Args:
        parallel: of one line (cfg=1), which both branches go through.
        fields: of all requests. options: of the engine.

    Raises:
        InvalidRequest: an expert makes no step.
    """
    found: dict[str, dict[str, list[list[float]]]] = {name: defaultdict(list) for name in spec.experts}
    # Ratios are in no snapshot, so that a run cannot go on from one.
    with Engine(CalibratingSpec.of(spec), parallel, **options, restarts=0) as engine:
        handles = [
            engine.submit(VideoRequest(prompt=prompt, seed=seed, **fields)) for seed, prompt in enumerate(prompts)
        ]
        for number, (prompt, handle) in enumerate(zip(prompts, handles, strict=True), 1):
            experts, *branches = handle.result(WAIT_LIMIT_S).latents.tolist()
            for branch, row in zip(BRANCHES, branches, strict=False):
                for expert, name in enumerate(spec.experts):
                    found[name][branch].append(
                        [value for value, own in zip(row, experts, strict=True) if own == expert]
                    )
            tell(f"{number}/{len(prompts)} {prompt}")
    idle = next((name for name, rows in found.items() if not rows[BRANCHES[0]][0]), None)
    if idle is not None:
        raise InvalidRequest(
            f"No step of these requests is made by {shown(idle)}, whose ratios are to be measured: give more steps."
        )
    return {name: {branch: _mean(rows) for branch, rows in by_branch.items()} for name, by_branch in found.items()}


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(values) / len(values) for values in zip(*rows, strict=True)]
