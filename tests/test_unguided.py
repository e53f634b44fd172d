"""Steps of one branch among steps of two: guidance of exactly 1 in one expert, whose second forward is left out."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import solver_oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Checkpoint, assert_equal
from plans import Plan, job
from symbolic_line import SymbolicLine, Wrong
from test_parity import DTYPES, picture
from test_simulator import Costs

from cineline import Engine, ParallelConfig, VideoRequest
from cineline.core.config import Dtype
from cineline.core.request import Branch, Group, Job, Kind
from cineline.families.wan.known import KNOWN
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.shapes import WanKind
from cineline.planning.bound import Bound
from cineline.planning.hardware import devices_of, link_of
from cineline.schedule.rule import Rule, Scripts, scripts_of
from cineline.schedule.scheduler import usual_in_flight
from cineline.schedule.simulator import simulate


def mixed(number: int, steps: int = 10, unguided: tuple[int, ...] = (1,)) -> Job:
    """Guidance by one expert alone."""
    return replace(job(number, steps), unguided=unguided)


# Bits.


def request(kind: WanKind, seed: int, **fields: Any) -> VideoRequest:
    """Guidance by the high-noise expert alone."""
    given: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "switch_step": 2}
    given |= {"guidance_scale": 3.5, "guidance_scale_2": 1.0, "skip_guidance_at_one": True}
    image = picture(70, 90, seed) if kind == "i2v" else None
    return VideoRequest(prompt=f"{seed} dogs", seed=seed, image=image, **given | fields)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("t2v", ParallelConfig()),
        ("i2v", ParallelConfig(pp=2)),
        ("t2v", ParallelConfig(pp=3)),
        ("t2v", ParallelConfig(pp=2, cfg=2)),
        ("i2v", ParallelConfig(cfg=2)),
        ("t2v", ParallelConfig(pp=3, expert_placement="split")),
        ("i2v", ParallelConfig(pp=2, cfg=2, expert_placement="split")),
    ],
)
def test_a_skipped_forward_equals_diffusers_without_it(
    kind: WanKind, parallel: ParallelConfig, dtype: Dtype, checkpoint: Checkpoint
) -> None:
    """In company of requests that skip nothing, or everything."""
    folder = checkpoint(RandomConfig(kind, seed=3))
    skipping = [
        request(kind, 1),
        request(kind, 2, solver="euler", num_inference_steps=5),
        request(kind, 3, switch_step=0),
    ]
    others = [request(kind, 4, skip_guidance_at_one=False), request(kind, 5, guidance_scale=1.0)]
    with Engine(folder, parallel, dtype=dtype, device="cpu") as engine:
        handles = [engine.submit(each) for each in (*skipping, *others)]
        expected = [solver_oracle.run(folder, dtype, each, skip=True) for each in skipping]
        expected += [solver_oracle.run(folder, dtype, each) for each in others]
        for handle, one in zip(handles, expected, strict=True):
            assert_equal(handle.result(120), one)


def test_it_is_off_by_default_for_diffusers_computes_it(checkpoint: Checkpoint) -> None:
    """And rounds: bits are others, where the two predictions are no neighbours (there cond - uncond is exact)."""
    folder = checkpoint(RandomConfig("t2v", seed=3))
    more: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 9, "num_inference_steps": 6, "switch_step": 1}
    more["negative_prompt"] = "x" * 40 + " blurry, other words entirely, 1234"
    plain = request("t2v", 1, skip_guidance_at_one=None, **more)
    computed, skipped = (solver_oracle.run(folder, "float32", plain, skip) for skip in (False, True))
    assert not torch.equal(computed[0], skipped[0])
    assert torch.allclose(computed[0], skipped[0], atol=1e-3)
    with Engine(folder, device="cpu") as engine:
        assert_equal(engine.submit(plain).result(60), computed)


# The rule.


def unaware(rule: Rule) -> Scripts:
    """Of a rule that takes each step for one with guidance."""
    return scripts_of(replace(rule, shape=rule.shape._replace(unguided=())))


def test_a_rule_that_does_not_know_is_found() -> None:
    def is_found(seed: int) -> bool:
        draw = random.Random(seed)
        plan = Plan.drawn(draw)
        try:
            SymbolicLine(plan, draw, unaware).run()
        except Wrong:
            return True
        return not any(one.unguided for one in plan.jobs)

    assert all(is_found(seed) for seed in range(100) if has_unguided_step(seed))


def has_unguided_step(seed: int) -> bool:
    """Of a request that nobody cancels."""
    plan = Plan.drawn(random.Random(seed))
    return any(
        expert in one.unguided
        for one in plan.jobs
        if one.id not in plan.cancels
        for expert in plan.experts(one)[one.first_step :]
    )


def test_the_second_line_has_nothing_to_do_in_such_a_step() -> None:
    parallel = ParallelConfig(pp=2, cfg=2)
    rule = Rule(parallel, mixed(0, 4).shape, (0, 0, 1, 1), parallel.place(2))
    steps = [group for group in scripts_of(rule) if group.kind is Kind.DENOISE]
    assert [group.number for group in steps if rule.chain(group)] == [0, 1]
    assert rule.items(Group(Kind.DENOISE, 0, 3), 1) == []
    assert [item.branch for item in rule.items(Group(Kind.DENOISE, 0, 3), 0)] == [Branch.COND]


# Time.


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_one_request_takes_a_slot_less_in_such_a_step(stages: int) -> None:
    found = simulate(Costs(ParallelConfig(pp=stages), high=6), [mixed(0)], 1)
    assert found.makespan_s == 6 * (stages + 1) + 4 * stages
    assert set(found.busy_s.values()) == {6 * 2 + 4}


def test_on_two_lines_the_second_one_idles_then() -> None:
    found = simulate(Costs(ParallelConfig(pp=2, cfg=2), high=6), [mixed(number) for number in range(4)], None)
    assert found.busy_s == {0: 40, 1: 40, 2: 24, 3: 24}
    items = Counter(entry.item.branch for entry in found.slices if entry.item.kind is Kind.DENOISE)
    assert items == {Branch.COND: 2 * 40, Branch.UNCOND: 2 * 24}


def test_the_default_in_flight_fills_the_line_in_the_steps_of_one_branch() -> None:
    whole, split = ParallelConfig(pp=8), ParallelConfig(pp=8, expert_placement="split", high_stages=4)
    assert usual_in_flight(whole, job(0)) == 8 // 2 + 2
    assert usual_in_flight(whole, mixed(0)) == usual_in_flight(whole, job(0, branches=1)) == 8 + 1
    assert usual_in_flight(split, mixed(0)) == (4 // 2 + 2) + (4 + 1)
    assert usual_in_flight(ParallelConfig(pp=4, cfg=2), mixed(0)) == 4 + 1
    costs = Costs(whole, high=5)
    jobs = [mixed(number, 40) for number in range(27)]
    found = simulate(costs, jobs, None)
    assert max(found.bubbles.values()) < 0.04


@settings(max_examples=100, deadline=None)
@given(
    costs=st.builds(
        Costs,
        st.builds(ParallelConfig, pp=st.integers(1, 5), cfg=st.integers(1, 2)),
        high=st.integers(0, 10),
        transfers_s=st.sampled_from([0.0, 0.3]),
    ),
    unguided=st.sampled_from([(0,), (1,), (0, 1)]),
    requests=st.integers(1, 6),
    in_flight=st.integers(1, 4),
)
def test_no_schedule_beats_the_bound(costs: Costs, unguided: tuple[int, ...], requests: int, in_flight: int) -> None:
    jobs = [mixed(number, 5, unguided) for number in range(requests)]
    bound = Bound(costs, jobs[0])
    assert bound.latency <= simulate(costs, jobs[:1], in_flight).makespan_s + 1e-6
    assert bound.total(in_flight, len(jobs)) <= simulate(costs, jobs, in_flight).makespan_s + 1e-6


def test_a_planned_line_is_faster_for_it() -> None:
    spec = KNOWN["Wan-AI/Wan2.2-T2V-A14B-Diffusers"]
    fields = {"height": 480, "width": 832, "guidance_scale": 3.5, "guidance_scale_2": 1.0}
    parallel = spec.place(ParallelConfig(pp=4, text_split=(6,) * 4, vae_decode="tail"))
    seconds = []
    for skips in (False, True):
        one = spec.resolve(VideoRequest(prompt="x", decode=False, skip_guidance_at_one=skips, **fields), 0)
        line = spec.line(parallel, devices_of("4xL40S"), link_of("pcie4"), one, "bfloat16")
        assert Bound(line, one).latency <= simulate(line, [one], 1).makespan_s
        seconds.append(Bound(line, one).period(8))
    high = spec.high_steps(one)
    assert seconds[1] / seconds[0] == pytest.approx((2 * high + one.steps - high) / (2 * one.steps), rel=0.02)
