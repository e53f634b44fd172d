"""What all blocks together add to the hidden states, kept from a step for those behind it that are skipped."""

from __future__ import annotations

import torch
from torch import Tensor

from cineline.core.request import Branch, WorkItem
from cineline.families.wan.state import WanState


def keep(state: WanState, item: WorkItem, before: Tensor, behind: Tensor) -> None:
    """Of a computed step, on the tail.

    Args:
        before, behind: hidden states [1, s, D] before the first block and behind the last one.
    """
    residual = behind - before
    if state.job.calibrates:
        last = state.residuals.get(item.branch) if state.position_in_expert(item.number) else None
        state.ratios.setdefault(item.branch, []).append(ratio(residual, last))
    state.residuals[item.branch] = residual


def are_kept(state: WanState, step: int) -> bool:
    """Whether a step's are needed."""
    return state.job.calibrates or state.job.shape.goes_on(step)


def add(state: WanState, item: WorkItem, before: Tensor) -> Tensor:
    """What stands for the hidden states behind the last block, of a step that is skipped."""
    behind = before + state.residuals[item.branch]
    if not are_kept(state, item.number):
        del state.residuals[item.branch]
    return behind


def ratio(residual: Tensor, last: Tensor | None) -> Tensor:
    """Of a residual's norms to the last step's, the mean over tokens; 1 of an expert's first step. As in diffusers
    (`MagCacheBlockHook`), a float32 scalar."""
    if last is None:
        return torch.ones((), device=residual.device)
    norms, norms_before = (torch.linalg.norm(each.float(), dim=-1) for each in (residual, last))
    mean: Tensor = (norms / (norms_before + 1e-8)).mean()
    return mean


def measured(state: WanState) -> Tensor:
    """The number of each step's expert, and by branch the ratios: float32 [1 + branches, steps]."""
    experts = torch.tensor([float(step.expert) for step in state.steps])
    rows = [torch.stack(state.ratios[Branch(branch)]).cpu() for branch in range(state.job.branches)]
    return torch.stack([experts, *rows])
