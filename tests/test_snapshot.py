"""A request's state, exported in the middle and restored elsewhere, goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cineline import ParallelConfig, VideoRequest
from cineline.core.config import DeviceConfig, Dtype, Place, VaeDecode
from cineline.core.request import Branch, Kind, WorkItem
from cineline.families import snapshot
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.spec import SOLVERS, WanSpec
from cineline.families.wan.stages import WanStages
from cineline.families.wan.state import WanState
from cineline.schedule.words import Value

Checkpoint = Callable[[RandomConfig], Path]

CPU = torch.device("cpu")


def family_of(spec: WanSpec, vae_decode: VaeDecode = "layers", dtype: Dtype = "bfloat16") -> WanStages:
    parallel = spec.place(ParallelConfig(vae_decode=vae_decode))
    config = DeviceConfig(dtype=dtype)
    family = WanStages(spec)
    family.load(StagePart(Place(), parallel, spec.cut(parallel, config)[0], CPU, config))
    return family


def admitted(family: WanStages, spec: WanSpec, **settings: int) -> WanState:
    """A request whose conditioning is made."""
    request = VideoRequest(prompt="a cat", seed=7, height=64, width=64, num_frames=9, **settings)
    state = family.admit(spec.resolve(request, 0), None)
    for branch in Branch:
        item = WorkItem(Kind.TEXT, 0, 0, branch)
        family.compute(state, item, True, True)
        family.take(state, Value.EMBEDDING, item, family.give(state, Value.EMBEDDING, item))
    family.compute(state, WorkItem(Kind.ENCODE, 0), True, True)
    return state


def run_steps(family: WanStages, state: WanState, steps: range) -> None:
    for step in steps:
        for branch in Branch:
            item = WorkItem(Kind.DENOISE, 0, step, branch)
            family.compute(state, item, True, True)
        family.finish(state, item)


def frames(family: WanStages, state: WanState, chunks: range) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        item = WorkItem(Kind.DECODE, 0, chunk)
        family.compute(state, item, True, True)
        made = family.answer(state, item)
        assert made is not None
        yield made


def moved(family: WanStages, state: WanState, fresh: WanState) -> None:
    """From one state to another, the way it travels."""
    item = WorkItem(Kind.DENOISE, 0)
    (spec,) = family.specs(fresh, Value.HISTORY, item)
    (packed,) = family.give(state, Value.HISTORY, item)
    assert (tuple(packed.shape), packed.dtype) == (spec.shape, spec.dtype)
    family.take(fresh, Value.HISTORY, item, (packed.clone(),))


@pytest.mark.parametrize("solver", SOLVERS)
@torch.no_grad()
def test_steps_go_on_where_they_were(solver: str, checkpoint: Checkpoint) -> None:
    spec = replace(WanSpec.open(checkpoint(RandomConfig("t2v"))), scheduler_class=solver)
    family = family_of(spec)
    for before in (1, 2, 3, 5):
        state, fresh = (admitted(family, spec, num_inference_steps=6) for _ in range(2))
        run_steps(family, state, range(before))
        moved(family, state, fresh)
        run_steps(family, state, range(before, 6))  # what was exported does not follow
        run_steps(family, fresh, range(before, 6))
        assert state.latents is not None and fresh.latents is not None
        assert torch.equal(fresh.latents, state.latents), f"after {before} steps"


@pytest.mark.parametrize("vae_decode", ["layers", "rows", "tiled"])
@torch.no_grad()
def test_a_decode_goes_on_where_it_was(vae_decode: VaeDecode, checkpoint: Checkpoint) -> None:
    spec = WanSpec.open(checkpoint(RandomConfig("ti2v")))
    family = family_of(spec, vae_decode)
    state, fresh = (admitted(family, spec, num_inference_steps=2) for _ in range(2))
    run_steps(family, state, range(2))
    list(frames(family, state, range(2)))
    exported = family.export(state)
    (expected,) = frames(family, state, range(2, 3))
    size = sum(tensor.nbytes for tensor in _tensors(exported))
    family.restore(fresh, snapshot.unpack(snapshot.pack(exported, snapshot.spec_of(size), CPU)))
    (made,) = frames(family, fresh, range(2, 3))
    assert len(made)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("stage", range(3))
@torch.no_grad()
def test_every_stage_exports_what_it_has(stage: int, checkpoint: Checkpoint) -> None:
    """Twice from the same: what goes on with a state does not change what was exported."""
    spec = WanSpec.open(checkpoint(RandomConfig("ti2v")))
    config, parallel = DeviceConfig(), ParallelConfig(pp=3, vae_split=(5, 5, 6))
    family, cut = WanStages(spec), spec.cut(parallel, config)[stage]
    family.load(StagePart(Place(pp=stage), parallel, cut, CPU, config))
    request = VideoRequest(prompt="a cat", height=64, width=64, num_frames=9, num_inference_steps=2)
    state = family.admit(spec.resolve(request, 0), None)
    came = [
        tuple(torch.randn(each.shape) for each in family.specs(state, Value.CHUNK, WorkItem(Kind.DECODE, 0, chunk)))
        for chunk in range(3)
    ]

    def decoded(own: WanState, chunk: int) -> tuple[torch.Tensor, ...]:
        own.hidden = came[chunk] if stage else ()
        family.compute(own, WorkItem(Kind.DECODE, 0, chunk), stage == 0, stage == 2)
        return own.take_hidden()

    decoded(state, 0)
    exported = family.export(state)
    found = []
    for _ in range(2):
        other = family.admit(state.job, None)
        family.restore(other, exported)
        found.append([decoded(other, chunk) for chunk in (1, 2)])
    expected = [decoded(state, chunk) for chunk in (1, 2)]
    for made in found:
        for ours, theirs in zip(made, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tensors(each)
