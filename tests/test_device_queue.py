"""Hosts that wait for their whole device, in between: where that is a deadlock, and what it costs to prevent it."""

from __future__ import annotations

import gc
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from device_queue import DeviceLine
from plans import Plan, job
from test_simulator import Costs

from cineline.core.config import ParallelConfig
from cineline.core.request import Job
from cineline.errors import Deadlock
from cineline.schedule.simulator import Deed, simulate
from cineline.schedule.words import Compute

Place = tuple[int, int]
"""A rank, and how many deeds it has done."""

QUICK, SLOW = 0.05, 2.5
"""Seconds that a host needs to launch an item which takes a second."""


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """A line is a ring of objects; what torch has made need not be gone through each time that some are collected."""
    gc.freeze()
    yield
    gc.unfreeze()


def run(
    costs: Costs,
    jobs: Sequence[Job],
    in_flight: int | None,
    launch_s: Sequence[float],
    at: set[Place] | None = None,
    waits: bool = True,
    looks_ahead: int = 1,
) -> DeviceLine:
    """With a host that waits for its whole device at each of these places."""
    return DeviceLine(costs, jobs, in_flight, launch_s, lambda *place: place in (at or ()), waits, looks_ahead).run()


def computes(line: DeviceLine) -> list[Place]:
    """Where an item's computation begins, on every rank."""
    return [
        (rank, place)
        for rank, deeds in line.done.items()
        for place, deed in enumerate(deeds)
        if isinstance(deed.action, Compute)
    ]


def deadlocks(
    costs: Costs,
    jobs: Sequence[Job],
    in_flight: int,
    launch_s: Sequence[float],
    waits: bool = True,
    looks_ahead: int = 1,
) -> list[str]:
    """Of all places at which one host may wait for its device, before it computes."""
    found = []
    for place in computes(run(costs, jobs, in_flight, launch_s, None, waits, looks_ahead)):
        try:
            run(costs, jobs, in_flight, launch_s, {place}, waits, looks_ahead)
        except Deadlock as error:
            found.append(str(error))
    return found


def slow_at(rank: int, ranks: int) -> list[float]:
    return [SLOW if other == rank else QUICK for other in range(ranks)]


def several(in_flight: int, steps: int = 2) -> list[Job]:
    """One request more than are in flight: the last one is alone in the line."""
    return [job(number, steps) for number in range(in_flight + 1)]


@pytest.mark.parametrize("in_flight", [1, 2, 3, 4])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_at_no_place_is_it_a_deadlock(stages: int, in_flight: int) -> None:
    costs = Costs(ParallelConfig(pp=stages), transfers_s=0.01)
    for slow in {0, stages // 2} if in_flight < 3 else {stages // 2, stages - 1}:
        assert deadlocks(costs, several(in_flight), in_flight, slow_at(slow, stages)) == []


@pytest.mark.parametrize("in_flight", [1, 2, 3, 4])
@pytest.mark.parametrize("stages", [3, 4])
def test_a_tail_that_says_begun_before_its_data_is_here_deadlocks(stages: int, in_flight: int) -> None:
    """The slow host has posted the receive of the next step, for which the whole line waits, when it is at this one."""
    costs = Costs(ParallelConfig(pp=stages), transfers_s=0.01)
    found = deadlocks(costs, several(in_flight), in_flight, slow_at(1, stages), waits=False, looks_ahead=2)
    here, ahead = r"rank 1 at (r\d) step 0 uncond", r"the hidden of \1 step 1 cond over edge ahead 0-1"
    assert any(re.search(rf"{here} waits for its whole device \({ahead}\)", error) for error in found)


def drawn_plan(draw: random.Random, one_line: bool = False) -> tuple[Costs, list[Job], int | None, list[float]]:
    """Any requests and any division in one lane, or in one line whose stages do not decode together, for `run`."""
    plan = Plan.drawn(draw)
    parallel = replace(plan.parallel, ring=1, ulysses=1, tp=1)
    if one_line:
        way = parallel.vae_decode if parallel.vae_decode != "rows" else "layers"
        parallel = replace(parallel, cfg=1, vae_decode=way)
    high, (chunk_s, text_s) = draw.randint(0, 10), (draw.choice([0.0, 0.3, 1.0, 4.0]) for _ in range(2))
    jobs = [job(one.id, min(one.steps, 3), one.branches, one.texts > 0, min(one.chunks, 3)) for one in plan.jobs]
    launch_s = [draw.choice([0.0, QUICK, 0.5, SLOW]) for _ in range(parallel.ranks)]
    return Costs(parallel, high, chunk_s, text_s, draw.choice([0.0, 0.01, 0.3])), jobs, plan.in_flight, launch_s


@pytest.mark.parametrize("seed", range(30))
def test_at_no_place_of_any_division_is_it_a_deadlock(seed: int) -> None:
    """Before whatever a rank does: it may be an allocation for a receive, too."""
    draw = random.Random(seed)
    costs, jobs, in_flight, launch_s = drawn_plan(draw, one_line=True)
    line = run(costs, jobs, in_flight, launch_s)
    places = [(rank, place) for rank, deeds in line.done.items() for place in range(len(deeds))]
    for place in draw.sample(places, min(len(places), 10)):
        run(costs, jobs, in_flight, launch_s, {place})


@pytest.mark.parametrize("slow", [3, 4, 5])
def test_with_two_lines_at_no_place_is_it_a_deadlock(slow: int) -> None:
    """The first line's tail says begun for both; the second line's middle is late."""
    costs = Costs(ParallelConfig(pp=3, cfg=2), transfers_s=0.01)
    assert deadlocks(costs, several(1), 1, slow_at(slow, 6)) == []
    assert deadlocks(costs, several(1), 1, slow_at(slow, 6), looks_ahead=2)


def test_where_ranks_decode_together_at_no_place_is_it_a_deadlock() -> None:
    """With a receive posted ahead, its sender may be in a collective, for which it waits for that rank."""
    costs = Costs(ParallelConfig(pp=3, vae_decode="rows"), chunk_s=1.0, transfers_s=0.01)
    jobs = [job(number, 3, 2, chunks=3) for number in range(2)]
    assert deadlocks(costs, jobs, 1, [QUICK] * 3) == []
    assert deadlocks(costs, jobs, 1, [QUICK] * 3, looks_ahead=2)


def at_all_places(parallel: ParallelConfig, looks_ahead: int = 1) -> None:
    costs, launch_s = Costs(parallel, chunk_s=1.0, transfers_s=0.01), [QUICK] * parallel.ranks
    jobs = [job(number, 3, 2, chunks=3) for number in range(4)]
    places = set(computes(run(costs, jobs, 3, launch_s, looks_ahead=looks_ahead)))
    run(costs, jobs, 3, launch_s, places, looks_ahead=looks_ahead)


def test_at_all_places_at_once_it_is_no_deadlock() -> None:
    """Each host waits for its device before every computation, as `torch.accelerator.synchronize` in a loop would."""
    for parallel in (ParallelConfig(pp=2), ParallelConfig(pp=3, cfg=2), ParallelConfig(pp=3, vae_decode="rows")):
        at_all_places(parallel)
    with pytest.raises(Deadlock):  # one has posted what the other has not sent, and the reverse
        at_all_places(ParallelConfig(pp=2), looks_ahead=2)


@pytest.mark.parametrize("seed", range(30))
def test_hosts_that_wait_anywhere_and_often_do_not_deadlock(seed: int) -> None:
    """Before whatever they do, all of it, or some of it."""
    draw = random.Random(seed)
    plan = drawn_plan(draw)
    line = run(*plan)
    places = [(rank, place) for rank, deeds in line.done.items() for place in range(len(deeds))]
    run(*plan, at=set(places))
    for share in (0.5, 0.1):
        run(*plan, at=set(draw.sample(places, int(share * len(places)))))


@pytest.mark.parametrize("transfers_s", [0.01, 0.05])
@pytest.mark.parametrize("launch_s", [0.0, 0.1])
@pytest.mark.parametrize("stages", [2, 4])
def test_what_prevents_it_costs_next_to_nothing(stages: int, launch_s: float, transfers_s: float) -> None:
    """Of the makespan, against hosts that run on and look ahead: 0.20 % at most where the line is full and a message
    takes 5 % of a computation, 0.12 % where it takes 1 %; a request alone 0.11 %."""
    costs = Costs(ParallelConfig(pp=stages), chunk_s=0.5, text_s=0.5, transfers_s=transfers_s)
    for in_flight in (stages // 2 + 2, 1):
        jobs, hosts = [job(number, 40, 2, True, 3) for number in range(2 * in_flight)], [launch_s] * stages
        freely = run(costs, jobs, in_flight, hosts, waits=False, looks_ahead=2)
        assert run(costs, jobs, in_flight, hosts).makespan_s < 1.0025 * freely.makespan_s


def turns(deeds: Sequence[Deed]) -> list[Deed]:
    """Without receives that are posted ahead: when headers come decides how far a rank has looked."""
    return [deed for deed in deeds if deed.action not in deed.script.ahead]


@pytest.mark.parametrize("in_flight", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_hosts_that_take_no_time_do_what_the_simulator_replays(stages: int, in_flight: int) -> None:
    """The same order, in nearly the same time."""
    costs, jobs = Costs(ParallelConfig(pp=stages), transfers_s=0.01), several(in_flight, steps=10)
    found, replayed = run(costs, jobs, in_flight, [0.0] * stages), simulate(costs, jobs, in_flight)
    assert found.makespan_s == pytest.approx(replayed.makespan_s, rel=1e-3)
    assert tuple(found.stream) == replayed.stream
    assert {rank: turns(deeds) for rank, deeds in found.done.items()} == {
        rank: turns(deeds) for rank, deeds in replayed.done.items()
    }
