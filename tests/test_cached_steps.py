"""Cached steps: which are skipped, who makes them, and that the line stays full; bits are in test_cached_bits.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plans import job
from test_simulator import Costs

from cineline.core.config import ParallelConfig, Place
from cineline.core.request import Group, Job, Kind, WorkItem
from cineline.schedule.scheduler import Scheduler, speed_up_limit, turns_of
from cineline.schedule.simulator import simulate


class SkippingCosts(Costs):
    """A skipped step takes nothing."""

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        skipped = item.kind is Kind.DENOISE and item.number in job.skipped
        return 0.0 if skipped else super().compute_s(place, item, job)


def skipping(number: int, steps: int, share: float, branches: int = 2) -> Job:
    """Of its steps, but for the first fifth, that share of all is skipped, in runs of three at most."""
    free = range(steps // 5, steps)
    wanted = round(share * steps)
    skipped = tuple(step for at, step in enumerate(free) if (at + 1) * wanted // len(free) > at * wanted // len(free))
    assert len(skipped) == wanted and 0 not in skipped
    return replace(job(number, steps, branches), skipped=skipped)


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize(("cfg", "branches"), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_the_line_stays_full_however_many_steps_are_skipped(stages: int, cfg: int, branches: int, share: float) -> None:
    """As many in flight as by default; what the shares allow is the speed of the line times that of the cache."""
    lined = 1 if cfg == 2 else branches
    count = stages + 1 if lined == 1 else stages // 2 + 2
    jobs = [skipping(number, 50, share, branches) for number in range(2 * count)]
    found = simulate(SkippingCosts(ParallelConfig(pp=stages, cfg=cfg)), jobs, None)
    alone = len(jobs) * 50 * lined * stages
    allowed = float(speed_up_limit(stages, count, lined)) / (1 - share)
    assert 0.9 * allowed <= alone / found.makespan_s <= allowed


def test_skipped_steps_go_with_the_step_before_them() -> None:
    one = replace(job(0, 6), skipped=(2, 3, 5))
    turns = list(turns_of(ParallelConfig(pp=2), one))
    steps = [[group.number for group in turn if group.kind is Kind.DENOISE] for turn in turns]
    assert steps == [[0], [1, 2, 3], [4, 5]]


def test_the_next_turn_waits_for_the_last_skipped_step() -> None:
    scheduler = Scheduler(ParallelConfig(pp=2), 1, lambda job: None)
    scheduler.submit(replace(job(0, 4), skipped=(1, 2)))
    emitted = scheduler.pump()
    assert [group.number for group in emitted if group.kind is Kind.DENOISE] == [0, 1, 2]
    for step, following in [(0, []), (1, []), (2, [Group(Kind.DENOISE, 0, 3, 2)])]:
        scheduler.begun(Group(Kind.DENOISE, 0, step, 2))
        assert scheduler.pump() == following
