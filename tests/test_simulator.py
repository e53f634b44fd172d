"""The simulator: against the formulas, and that no division deadlocks; a wrong order is found."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import job

from cineline.core.config import ParallelConfig, Place, VaeDecode
from cineline.core.request import Branch, Group, Job, Kind, WorkItem
from cineline.core.trace import Slice, write_trace
from cineline.errors import Deadlock, OutputError
from cineline.schedule.rule import Parcel, Rule, Scripts, scripts_of
from cineline.schedule.scheduler import speed_up_limit
from cineline.schedule.simulator import Simulation, simulate
from cineline.schedule.timeline import draw_timeline
from cineline.schedule.words import Action, Do, Post, Script, Value, Wait


@dataclass(frozen=True)
class Costs:
    """Every forward takes a second on each stage; what else takes time is said.

    Attributes:
        high: steps of the first expert, in tenths of all.
        chunk_s, text_s, transfers_s: of a chunk, a prompt, a message.
    """

    parallel: ParallelConfig
    high: int = 0
    chunk_s: float = 0.0
    text_s: float = 0.0
    transfers_s: float = 0.0

    def expert(self, job: Job, step: int) -> int:
        return int(10 * step >= self.high * job.steps)

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        return {Kind.DENOISE: 1.0, Kind.DECODE: self.chunk_s, Kind.TEXT: self.text_s}.get(item.kind, 0.0)

    def transfer_s(self, value: Value, item: WorkItem, job: Job) -> float:
        return self.transfers_s

    def resident_bytes(self, place: Place) -> int:
        return 1000 * (place.pp + 1)

    def admitted_bytes(self, place: Place, job: Job) -> int:
        return 100

    def working_bytes(self, place: Place, item: WorkItem, job: Job) -> int:
        return 7 if item.kind is Kind.DECODE else 5


def slots(stages: int, requests: int, branches: int, steps: int) -> int:
    """Of equal requests on equal stages: a step comes round after max(B M, P + B - 1) slots; the last one drains."""
    items = branches * requests
    return (steps - 1) * max(items, stages + branches - 1) + items + stages - 1


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("requests", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_equal_requests_take_what_the_formula_says(stages: int, requests: int, branches: int) -> None:
    steps = 40
    found = simulate(Costs(ParallelConfig(pp=stages)), [job(n, steps, branches) for n in range(requests)], requests)
    assert found.makespan_s == slots(stages, requests, branches, steps)
    work = requests * branches * steps
    assert set(found.busy_s.values()) == {work}
    assert found.bubbles[0] == pytest.approx(1 - work / found.makespan_s)
    limit = float(speed_up_limit(stages, requests, branches))
    fill = stages + branches - 1
    assert limit * (1 - fill / found.makespan_s) <= work * stages / found.makespan_s <= limit


@settings(max_examples=40, deadline=None)
@given(stages=st.integers(1, 8), requests=st.integers(1, 8), steps=st.integers(40, 50))
def test_throughput_is_within_four_percent_of_the_limit(stages: int, requests: int, steps: int) -> None:
    found = simulate(Costs(ParallelConfig(pp=stages)), [job(n, steps) for n in range(requests)], requests)
    speed_up = 2 * requests * steps * stages / found.makespan_s
    limit = 2 * requests * stages / max(2 * requests, stages + 1)
    assert 0.96 * limit <= speed_up <= limit


@pytest.mark.parametrize("requests", [1, 3, 5])
@pytest.mark.parametrize("stages", [2, 4])
def test_with_two_lines_a_step_is_one_item_of_each(stages: int, requests: int) -> None:
    found = simulate(Costs(ParallelConfig(pp=stages, cfg=2)), [job(n, 20) for n in range(requests)], requests)
    assert found.makespan_s == slots(stages, requests, 1, 20)
    assert found.busy_s == dict.fromkeys(range(2 * stages), 20 * requests)


def test_without_guidance_the_second_line_is_idle() -> None:
    found = simulate(Costs(ParallelConfig(pp=2, cfg=2)), [job(0, 4, branches=1)], 1)
    assert found.busy_s == {0: 4, 1: 4, 2: 0, 3: 0}


def test_split_experts_hand_a_request_over() -> None:
    costs = Costs(ParallelConfig(pp=8, expert_placement="split", high_stages=5), high=6)
    found = simulate(costs, [job(0, 10)], 1)
    assert found.makespan_s == 6 * (5 + 1) + 4 * (3 + 1)
    assert found.busy_s == {rank: 12 if rank < 5 else 8 for rank in range(8)}
    several = simulate(costs, [job(n, 10) for n in range(12)], None)
    busiest = max(several.busy_s.values())
    assert busiest <= several.makespan_s <= busiest + found.makespan_s


def test_messages_take_time() -> None:
    """One request without guidance: at P stages each step goes over P - 1 forward edges and comes back over one."""
    costs = Costs(ParallelConfig(pp=4), transfers_s=0.25)
    found = simulate(costs, [job(0, 5, branches=1)], 1)
    assert found.makespan_s == 5 * (4 + 4 * 0.25) - 0.25


@pytest.mark.parametrize(("way", "seconds"), [("layers", 21 + 3), ("rows", 21), ("tail", 21), ("tiled", 21)])
def test_decode_by_layers_is_a_pipeline_of_chunks(way: VaeDecode, seconds: float) -> None:
    costs = Costs(ParallelConfig(pp=4, vae_decode=way), chunk_s=1.0)
    found = simulate(costs, [job(0, 1, branches=1, chunks=21)], 1)
    assert found.makespan_s == 4 + seconds
    assert found.busy_s[0] == 1 + 21 * (way in ("layers", "rows"))
    assert found.busy_s[3] == 1 + 21


def test_prompts_go_through_the_stages() -> None:
    found = simulate(Costs(ParallelConfig(pp=4), text_s=2.0), [job(0, 1, texts=True)], 1)
    assert found.makespan_s == 2 * (4 + 1) + 4 + 1


def test_memory_is_weights_requests_and_the_item_at_work() -> None:
    found = simulate(Costs(ParallelConfig(pp=2, vae_decode="tail")), [job(n, 6, chunks=2) for n in range(3)], 2)
    assert found.peak_bytes[0] == 1000 + 2 * 100 + 5
    assert found.peak_bytes[1] == 2000 + 3 * 100 + 7  # the third is admitted while one decodes


splits = st.integers(2, 5).flatmap(
    lambda pp: st.builds(
        ParallelConfig,
        pp=st.just(pp),
        cfg=st.integers(1, 2),
        expert_placement=st.just("split"),
        high_stages=st.integers(1, pp - 1),
        vae_decode=st.sampled_from(["layers", "rows", "tail", "tiled"]),
    )
)
wholes = st.builds(
    ParallelConfig,
    pp=st.integers(1, 5),
    cfg=st.integers(1, 2),
    vae_decode=st.sampled_from(["layers", "rows", "tail", "tiled"]),
)
times = st.sampled_from([0.0, 0.3, 1.0, 4.0])
profiles = st.builds(
    Costs, st.one_of(wholes, splits), high=st.integers(0, 10), chunk_s=times, text_s=times, transfers_s=times
)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 2), st.booleans(), st.integers(0, 6))


@settings(max_examples=300, deadline=None)
@given(
    costs=profiles,
    wanted=st.lists(shapes, min_size=1, max_size=6),
    in_flight=st.one_of(st.none(), st.integers(1, 5)),
    rendezvous=st.booleans(),
)
def test_no_division_deadlocks_and_everything_is_done_once_and_in_order(
    costs: Costs, wanted: list[tuple[int, int, bool, int]], in_flight: int | None, rendezvous: bool
) -> None:
    jobs = [job(number, *shape) for number, shape in enumerate(wanted)]
    found = simulate(costs, jobs, in_flight, rendezvous)
    by_rank = {rank: [entry for entry in found.slices if entry.rank == rank] for rank in found.busy_s}
    for rank, slices in by_rank.items():
        items = [entry.item for entry in slices]
        assert Counter(items) == Counter(expected_on(costs, rank, jobs))
        assert all(before.end_ns <= after.start_ns for before, after in pairwise(slices))
        for one in jobs:
            own = [(item.kind, item.number, item.branch) for item in items if item.request == one.id]
            assert own == sorted(own)
    for first, second in combinations(by_rank.values(), 2):  # all ranks follow one stream
        orders = [[stream_item(entry.item, costs.parallel) for entry in slices] for slices in (first, second)]
        common = set(orders[0]) & set(orders[1])
        assert [item for item in orders[0] if item in common] == [item for item in orders[1] if item in common]


def stream_item(item: WorkItem, parallel: ParallelConfig) -> WorkItem:
    return item._replace(branch=Branch.COND) if parallel.cfg == 2 else item


def expected_on(costs: Costs, rank: int, jobs: Sequence[Job]) -> list[WorkItem]:
    """What should run on a rank, said in another way than the scripts do."""
    parallel, place = costs.parallel, costs.parallel.place(rank)
    items = []
    for one in jobs:
        branches = [Branch(place.cfg)] if parallel.cfg == 2 else list(Branch)[: one.branches]
        if place.cfg >= one.branches:
            continue
        items += [WorkItem(Kind.TEXT, one.id, 0, branch) for branch in branches] if one.texts else []
        items.append(WorkItem(Kind.ENCODE, one.id))
        for step in range(one.steps):
            group = parallel.groups[costs.expert(one, step) if len(parallel.groups) == 2 else 0]
            if place.pp in group:
                items += [WorkItem(Kind.DENOISE, one.id, step, branch) for branch in branches]
        if place.cfg == 0 and (place.pp == parallel.pp - 1 or parallel.vae_decode in ("layers", "rows")):
            items += [WorkItem(Kind.DECODE, one.id, chunk) for chunk in range(one.chunks)]
    return items


def changed(monkeypatch: pytest.MonkeyPatch, change: Callable[[Script], Script]) -> None:
    """Let every rank follow other scripts."""

    def other(rule: Rule) -> Scripts:
        return {group: tuple(map(change, own)) for group, own in scripts_of(rule).items()}

    monkeypatch.setattr("cineline.schedule.simulator.scripts_of", other)


@pytest.mark.parametrize("stages", [2, 4])
def test_a_receive_that_is_posted_too_late_is_a_deadlock(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head posts the receive of its latents only when it needs them; until then the tail cannot go on."""

    def late(script: Script) -> Script:
        run: list[Action] = []
        for action in script.run:
            if isinstance(action, Post):
                continue
            if isinstance(action, Wait) and action.value is Value.LATENTS:
                run.append(Post(action.edge, action.item, action.value))
            run.append(action)
        return replace(script, run=tuple(run))

    costs, jobs = Costs(ParallelConfig(pp=stages)), [job(number, 3) for number in range(stages + 2)]
    simulate(costs, jobs, None, rendezvous=True)
    changed(monkeypatch, late)
    with pytest.raises(Deadlock, match=rf"rank {stages - 1} .*to send the latents over edge back {stages - 1}-0"):
        simulate(costs, jobs, len(jobs), rendezvous=True)


def test_embeddings_and_latents_on_one_edge_must_keep_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Posted a look ahead, a prompt's receive would come before that of latents that are sent before it."""

    def early(script: Script) -> Script:
        embeddings = [action for action in script.run if isinstance(action, Post) and script.item.kind is Kind.TEXT]
        run = tuple(action for action in script.run if action not in embeddings)
        return replace(script, ahead=(*script.ahead, *embeddings), run=run)

    costs, jobs = Costs(ParallelConfig(pp=2), chunk_s=4.0), [job(n, 1 + n % 2, 1, True, 1) for n in range(6)]
    simulate(costs, jobs, 3)
    changed(monkeypatch, early)
    with pytest.raises(Deadlock, match="edge back 1-0 disagree"):
        simulate(costs, jobs, 3)


def test_ends_that_disagree_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(script: Script) -> Script:
        ahead = tuple(Post(post.edge, post.item._replace(number=7), post.value) for post in script.ahead)
        return replace(script, ahead=ahead)

    changed(monkeypatch, swapped)
    with pytest.raises(Deadlock, match="edge ahead 0-1 disagree"):
        simulate(Costs(ParallelConfig(pp=2)), [job(0)], 1)


def test_lines_that_wait_for_each_other_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line's tail waits for the second one's prediction only when it has its own: else each would wait for
    a forward of the other's tail."""

    class Waiting(Rule):
        def parcels(self, group: Group) -> Iterator[Parcel]:
            for parcel in super().parcels(group):
                yield replace(parcel, at_finish=parcel.at_finish and parcel.value is not Value.PREDICTION)

    costs, jobs = Costs(ParallelConfig(pp=2, cfg=2)), [job(n, 20) for n in range(3)]
    assert simulate(costs, jobs, 3).makespan_s == slots(2, 3, 1, 20)
    monkeypatch.setattr("cineline.schedule.simulator.Rule", Waiting)
    assert simulate(costs, jobs, 3).makespan_s > slots(2, 3, 1, 20)
    assert simulate(costs, [job(0, 20)], 1).makespan_s > 1.4 * slots(2, 1, 1, 20)


def test_a_rank_that_never_answers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(script: Script) -> Script:
        return replace(script, run=tuple(action for action in script.run if action is not Do.BEGUN))

    changed(monkeypatch, silent)
    with pytest.raises(Deadlock, match="2 of 2 requests are not done: no rank has anything to do"):
        simulate(Costs(ParallelConfig(pp=2)), [job(0), job(1)], 2)


def test_the_timeline_is_in_the_engines_own_format(tmp_path: Path) -> None:
    found = some_run()
    write_trace(found.slices, tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    bars = [event for event in events if event["ph"] == "X"]
    assert len(bars) == len(found.slices)
    assert max(event["ts"] + event["dur"] for event in bars) == pytest.approx(found.makespan_s * 1e6)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_is_drawn(suffix: str, tmp_path: Path) -> None:
    draw_timeline(some_run().slices, tmp_path / f"t{suffix}")
    start = (tmp_path / f"t{suffix}").read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")


def test_a_picture_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"use \.png or \.svg"):
        draw_timeline([Slice(0, WorkItem(Kind.ENCODE, 0), 0, 1, 0)], tmp_path / "t.gif")


def some_run() -> Simulation:
    costs = Costs(ParallelConfig(pp=4), chunk_s=0.7, text_s=0.5, transfers_s=0.05)
    return simulate(costs, [job(n, 3 + n, 1 + n % 2, True, 4) for n in range(3)], None)
