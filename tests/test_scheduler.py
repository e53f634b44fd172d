"""The scheduler alone, against a model of the line: order, limits, and that it always ends."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_family import ToySpec

from cineline import ParallelConfig, VideoRequest
from cineline.core.request import Group, Job, Kind
from cineline.schedule.scheduler import MOST_WAITING, Scheduler, default_in_flight, speed_up_limit, turns_of


def job(number: int, steps: int = 3, guidance: float = 2.0, chunks: int = 0, first: int = 0, expert: int = 0) -> Job:
    request = VideoRequest(
        prompt="x",
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_frames=max(1, chunks),
        decode=chunks > 0,
    )
    return replace(ToySpec().resolve(request, number), first_step=min(first, steps - 1), first_expert=expert)


shape = st.tuples(st.integers(1, 4), st.sampled_from([1.0, 2.0]), st.integers(0, 3), st.integers(0, 3))
jobs = st.lists(shape, min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(shapes=jobs, stages=st.integers(1, 8), in_flight=st.one_of(st.none(), st.integers(1, 4)))
def test_every_job_runs_whole_in_order_and_within_the_limits(
    shapes: list[tuple[int, float, int, int]], stages: int, in_flight: int | None
) -> None:
    admitted: list[int] = []
    scheduler = Scheduler(ParallelConfig(pp=stages), in_flight, lambda job: admitted.append(job.id))
    wanted = {number: job(number, *shape) for number, shape in enumerate(shapes)}
    for one in wanted.values():
        scheduler.submit(one)
    stream: deque[Group] = deque(scheduler.pump())
    seen: dict[int, list[Group]] = {number: [] for number in wanted}
    finished: set[int] = set()
    steps_left = {number: one.steps - one.first_step for number, one in wanted.items()}
    decoding: set[int] = set()
    while stream:
        item = stream.popleft()
        assert item.request in admitted, "emitted before it was admitted"
        seen[item.request].append(item)
        emitted = {other.request for other in (item, *stream) if other.kind is Kind.DECODE}
        limit = in_flight or default_in_flight(stages, 1)
        assert len([number for number in admitted if steps_left[number]]) <= limit
        assert len(set(admitted) - decoding - finished - emitted) <= (1 + MOST_WAITING) * limit
        if item.kind is Kind.DECODE:
            decoding.add(item.request)
            assert len(decoding - finished) <= 1, "two requests decode at once"
        if item.kind is Kind.ENCODE:
            continue  # it ends no turn
        scheduler.begun(item)
        stream.extend(scheduler.pump())
        steps_left[item.request] -= item.kind is Kind.DENOISE
        if scheduler.complete(item):
            finished.add(item.request)
        stream.extend(scheduler.pump())
    assert finished == wanted.keys()
    for number, items in seen.items():
        assert items == [item for turn in turns_of(ParallelConfig(pp=stages), wanted[number]) for item in turn]


def test_a_cancelled_request_is_dropped_once_and_only_when_it_is_in_the_line() -> None:
    scheduler = Scheduler(ParallelConfig(pp=2), 1, lambda job: None)
    scheduler.submit(job(0))
    scheduler.submit(job(1))
    scheduler.pump()
    assert scheduler.cancel(1) is None  # still waiting
    assert scheduler.cancel(0) == Group(Kind.DROP, 0)
    assert scheduler.cancel(0) is None
    assert scheduler.pump() == []


def test_a_request_counts_in_the_group_of_stages_that_it_goes_on_in() -> None:
    """Two groups of one stage, one request in each: of those that begin anew only one comes in, others beside it."""
    parallel = ParallelConfig(pp=2, expert_placement="split", high_stages=1)
    for experts, admitted in (((0, 0), {0}), ((1, 0), {0, 1}), ((0, 1), {0, 1}), ((1, 1, 1), {0, 1})):
        scheduler = Scheduler(parallel, 2, lambda job: None)
        for number, expert in enumerate(experts):
            scheduler.submit(job(number, first=expert, expert=expert))
        assert {group.request for group in scheduler.pump()} == admitted


def test_a_cancel_makes_room() -> None:
    scheduler = Scheduler(ParallelConfig(pp=2), 1, lambda job: None)
    scheduler.submit(job(0))
    scheduler.submit(job(1))
    assert {item.request for item in scheduler.pump()} == {0}
    drop = scheduler.cancel(0)
    assert drop is not None
    assert scheduler.pump() == []  # the line is not through with it
    assert not scheduler.complete(drop)
    assert {item.request for item in scheduler.pump()} == {1}


@pytest.mark.parametrize(("stages", "branches", "expected"), [(1, 2, 2), (2, 2, 3), (4, 2, 4), (8, 2, 6), (4, 1, 5)])
def test_the_default_in_flight_fills_the_line_with_one_to_spare(stages: int, branches: int, expected: int) -> None:
    assert default_in_flight(stages, branches) == expected
    assert speed_up_limit(stages, expected - 1, branches) == stages


@pytest.mark.parametrize(("stages", "row"), [(2, [1.33, 2, 2, 2]), (4, [1.60, 3.2, 4, 4]), (8, [1.78, 3.56, 5.33, 8])])
def test_the_limit_with_guidance(stages: int, row: list[float]) -> None:
    assert [round(float(speed_up_limit(stages, count, 2)), 2) for count in (1, 2, 3, 5)] == row


def test_the_limit_without_guidance() -> None:
    assert [float(speed_up_limit(4, count, 1)) for count in (1, 2, 4, 5)] == [1, 2, 4, 4]
