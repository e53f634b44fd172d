"""A rank's rehearsal: every kind of item that it has a part in is run once, alone, before requests come."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from oracle import Checkpoint

from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.request import Kind, WorkItem
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.stages import WanStages
from cineline.rank.rehearsal import rehearse
from cineline.transport.queue import HostQueue


class CountingStages(WanStages):
    def __init__(self, spec: WanSpec) -> None:
        super().__init__(spec)
        self.computed: Counter[Kind] = Counter()
        self.steps: Counter[int] = Counter()
        self.chunks: Counter[int] = Counter()

    def compute(self, state: Any, item: WorkItem, starts: bool, ends: bool) -> None:
        self.computed[item.kind] += 1
        if item.kind is Kind.DENOISE:
            self.steps[self.expert(state, item.number)] += 1
        elif item.kind is Kind.DECODE:
            self.chunks[item.number] += 1
        super().compute(state, item, starts, ends)


def rehearsed(spec: WanSpec, parallel: ParallelConfig) -> list[CountingStages]:
    config = DeviceConfig()
    parallel = spec.place(parallel)
    cut = spec.cut(parallel, config)
    parallel = parallel.filled(cut)
    stages = []
    for rank in range(parallel.ranks):
        place = parallel.place(rank)
        family = CountingStages(spec)
        part = StagePart(place, parallel, cut[place.pp], torch.device("cpu"), config)
        with torch.no_grad():
            family.load(part)
        rehearse(family, part, HostQueue())
        stages.append(family)
    return stages


@pytest.mark.parametrize("kind", ["ti2v", "t2v", "i2v"])
def test_every_kind_of_item_is_run_on_every_stage(kind: WanKind, checkpoint: Checkpoint) -> None:
    spec = WanSpec.open(checkpoint(RandomConfig(kind)))
    for family in rehearsed(spec, ParallelConfig(pp=3)):
        stage, parallel = family._part.place.pp, family._part.parallel
        parts = {Kind.TEXT: stage in parallel.encoders, Kind.DECODE: stage in parallel.decoders}
        assert set(family.computed) == {kind for kind in Kind if kind is not Kind.DROP and parts.get(kind, True)}
        assert set(family.steps) == set(range(len(spec.experts)))
        assert min(family.steps.values()) >= 3  # a solver of third order has another formula for each of these
        assert set(family.chunks) == ({0, 1, 2} if parts[Kind.DECODE] else set())


def test_split_experts_rehearse_their_own(checkpoint: Checkpoint) -> None:
    spec = WanSpec.open(checkpoint(RandomConfig("t2v")))
    first, second = rehearsed(spec, ParallelConfig(pp=2, expert_placement="split"))
    assert set(first.steps) == {0} and set(second.steps) == {1}


def test_each_line_rehearses_its_branch(checkpoint: Checkpoint) -> None:
    spec = WanSpec.open(checkpoint(RandomConfig("ti2v")))
    for family in rehearsed(spec, ParallelConfig(pp=2, cfg=2)):
        assert family.computed[Kind.DENOISE] > 0
