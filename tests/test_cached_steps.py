"""Cached steps: which are skipped, who makes them, and that the line stays full; bits are in test_cached_bits.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import MagCacheConfig
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.hooks.mag_cache import MagCacheHeadHook, MagCacheState
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import job
from test_simulator import Costs

from cineline.core.config import ParallelConfig, Place
from cineline.core.request import Group, Job, Kind, WorkItem
from cineline.families.wan.mag_cache import skipped_steps
from cineline.planning.bound import Bound
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


@settings(max_examples=60, deadline=None)
@given(
    costs=st.builds(
        SkippingCosts,
        st.one_of(
            st.builds(ParallelConfig, pp=st.integers(1, 5), cfg=st.integers(1, 2)),
            st.just(ParallelConfig(pp=3, expert_placement="split", high_stages=1)),
        ),
        high=st.integers(0, 10),
        transfers_s=st.sampled_from([0.0, 0.3]),
    ),
    skipped=st.sets(st.integers(1, 5)),
    requests=st.integers(1, 6),
    in_flight=st.integers(1, 4),
)
def test_no_schedule_beats_the_bound(costs: Costs, skipped: set[int], requests: int, in_flight: int) -> None:
    own = tuple(sorted(step for step in skipped if costs.expert(job(0, 6), step - 1) == costs.expert(job(0, 6), step)))
    jobs = [replace(job(number, 6), skipped=own) for number in range(requests)]
    bound = Bound(costs, jobs[0])
    assert bound.latency <= simulate(costs, jobs[:1], in_flight).makespan_s + 1e-6
    assert bound.total(in_flight, len(jobs)) <= simulate(costs, jobs, in_flight).makespan_s + 1e-6


@pytest.mark.parametrize("number", range(20))
def test_the_steps_are_those_of_diffusers_hook(number: int) -> None:
    """Number for number: its own class, driven step by step, with a module that only says that it was called."""
    draw = random.Random(number)
    measured = tuple(1 + draw.gauss(0, 0.03) for _ in range(draw.randint(1, 60)))
    experts = sorted(draw.randrange(2) for _ in range(draw.randint(1, 60)))
    threshold = draw.choice([0.02, 0.06, 0.1, 0.3, 9.0])
    ours = skipped_steps((measured, measured[::-1]), threshold, experts)
    theirs = [
        number
        for number, computed in enumerate(
            computed
            for expert, ratios in enumerate((measured, measured[::-1]))
            for computed in by_hook(ratios, threshold, experts.count(expert))
        )
        if not computed
    ]
    assert list(ours) == theirs
    if len(experts) > 20 and threshold > 0.2:
        assert ours


def by_hook(ratios: tuple[float, ...], threshold: float, steps: int) -> Iterator[bool]:
    """Of each step, whether it is computed."""
    if not steps:
        return
    config = MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=list(ratios))
    states = StateManager(MagCacheState, (), {})
    states.set_context(CacheContext(name="cond"))
    hook = MagCacheHeadHook(states, config)
    hook._metadata = SimpleNamespace(
        hidden_states_argument_name="hidden_states",
        return_encoder_hidden_states_index=None,
        _get_parameter_from_args_kwargs=lambda name, given, named: given[0],
    )
    called: list[bool] = []
    hook.fn_ref = SimpleNamespace(original_forward=lambda hidden: called.append(True))
    for step in range(steps):
        called.clear()
        states.get_state().step_index = step
        hook.new_forward(torch.nn.Identity(), torch.ones(1, 1, 1))
        if called:
            states.get_state().previous_residual = torch.zeros(1, 1, 1)
        yield bool(called)
