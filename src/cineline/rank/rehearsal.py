"""What a rank does once before it is ready: a small item of each kind, so that few kernels are loaded in the line.

An accelerator's kernels may be loaded when they are first used, which stops the whole device. That is no deadlock
(`transport.queue`), but others wait for it. Libraries choose some kernels by size: those come with the first request.
"""

from __future__ import annotations

from typing import Any

import torch

from cineline.core.image import KeyFrames
from cineline.core.request import Job
from cineline.families.pipeline_parallel import Hidden, PipelineParallelMixin, StagePart
from cineline.rank.guard import extremes
from cineline.schedule.rule import Rule, scripts_of
from cineline.schedule.words import Action, Compute, Do, Keep, Script, Send, Value, Wait
from cineline.transport.queue import DeviceQueue


@torch.no_grad()
def rehearse(family: PipelineParallelMixin[Any], part: StagePart, device: DeviceQueue) -> None:
    """Do what the scripts of the family's rehearsals say, alone: zeros come, and what is sent goes nowhere.

    Ranks that share an item (lanes, rows) meet in it as ever, so that all of them must rehearse.
    """
    for job, image in family.rehearsals():
        if part.place.cfg < job.branches:
            _rehearse(family, part, device, job, image)
    device.drain()


def _rehearse(
    family: PipelineParallelMixin[Any], part: StagePart, device: DeviceQueue, job: Job, image: KeyFrames | None
) -> None:
    state = family.admit(job, image if part.is_head else None)
    experts = tuple(family.expert(state, step) for step in range(job.steps))
    for own in scripts_of(Rule(part.parallel, state.job.shape, experts, part.place)).values():
        for script in own:
            for action in script.run:
                _act(family, state, device, script, action)


def _act(family: PipelineParallelMixin[Any], state: Any, device: DeviceQueue, script: Script, action: Action) -> None:
    match action:
        case Wait(value=Value.HISTORY):
            pass  # zeros are no history; without one a solver begins anew
        case Wait():
            specs = family.specs(state, action.value, action.item)
            zeros = tuple(torch.zeros(spec.shape, dtype=spec.dtype, device=device.device) for spec in specs)
            family.take(state, action.value, action.item, zeros)
            _look(zeros, device)
        case Send():
            family.give(state, action.value, action.item)
        case Keep():
            family.take(state, action.value, action.item, family.give(state, action.value, action.item))
        case Compute():
            family.compute(state, script.item, action.starts, action.ends)
            _look(state.made(script.item, action.ends), device)
        case Do.FINISH:
            family.finish(state, script.item)
            _look((state.latents,), device)
        case Do.DONE | Do.MOVES:
            answer = family.answer(state, script.item)
            if answer is not None:
                device.to_host(answer)
        case Do.DENOISED:
            family.end_denoising(state)


def _look(tensors: Hidden, device: DeviceQueue) -> None:
    """As the guard does."""
    if seen := extremes(tensors):
        device.to_host(torch.stack(seen))
