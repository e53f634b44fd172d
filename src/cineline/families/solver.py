"""What a solver, diffusers' own scheduler object, keeps between a request's steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cineline.families.snapshot import copied


def contents(solver: Any) -> dict[str, Any]:
    """What a solver has now; its lists are copied, for it changes them in place."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(solver).items()}


def export_solver(solver: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """What steps have changed of a solver, against its `contents` before them: its history, and what it counts."""
    return {
        name: copied(value)
        for name, value in vars(solver).items()
        if name not in before or not _same(value, before[name])
    }


def restore_solver(solver: Any, exported: Mapping[str, Any]) -> None:
    """Go on with a new solver where the other one was."""
    vars(solver).update(copied(dict(exported)))


def history_bytes(solver: Any, latents: int) -> int:
    """Of the tensors that a solver keeps between steps at most, for so many bytes of float32 latents: a prediction for
    each order, and a sample."""
    return latents * (int(getattr(solver.config, "solver_order", 0)) + 1)


def _same(one: Any, other: Any) -> bool:
    """Tensors are so where they are the same one: a look at an accelerator's values would wait for all in its queue."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    if isinstance(one, list):
        same_length = isinstance(other, list) and len(one) == len(other)
        return same_length and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return one is other or bool(np.all(one == other))
