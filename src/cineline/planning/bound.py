"""What no schedule of a line can beat: lower bounds of its seconds, cheap enough for every plan (no torch).

How long it does take, the simulator says; the bounds say which plans need not be simulated, and what limits one.

Legend: M requests in flight, N requests that wait.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from cineline.core.config import Place
from cineline.core.costs import Profile
from cineline.core.request import Job, Kind, Value, WorkItem
from cineline.schedule.rule import HANDED_ON


def lined_branches(costs: Profile, job: Job) -> int:
    """Prompts that each line runs, and forwards of a step with guidance."""
    return 1 if costs.parallel.cfg == 2 else job.branches


def forwards_of(costs: Profile, job: Job, expert: int) -> int:
    """Forwards of a step of the expert that the first line runs."""
    return 1 if expert in job.unguided else lined_branches(costs, job)


def steps_of(costs: Profile, job: Job) -> Counter[tuple[int, bool]]:
    """Numbers of steps by expert, and by whether they are skipped."""
    return Counter((costs.expert(job, step), step in job.skipped) for step in range(job.steps))


def items_of(costs: Profile, job: Job) -> list[tuple[WorkItem, int]]:
    """A request's items in one line, those that are alike once, with their number."""
    branches = lined_branches(costs, job)
    found = [(WorkItem(Kind.TEXT, job.id), branches)] if job.texts else []
    found.append((WorkItem(Kind.ENCODE, job.id), 1))
    first = {(costs.expert(job, step), step in job.skipped): step for step in reversed(range(job.steps))}
    for sort, steps in steps_of(costs, job).items():
        found.append((WorkItem(Kind.DENOISE, job.id, first[sort]), forwards_of(costs, job, sort[0]) * steps))
    chunks = {0: 1, 1: job.chunks - 2, job.chunks - 1: 1} if job.chunks > 1 else {0: job.chunks}
    return found + [(WorkItem(Kind.DECODE, job.id, chunk), number) for chunk, number in chunks.items() if number > 0]


def stages_of(costs: Profile, job: Job, item: WorkItem) -> Sequence[int]:
    """The stages that compute the item; conditioning is the head's."""
    if item.kind is Kind.DENOISE:
        route = costs.parallel.route(costs.expert(job, item.number))
        return route[-1:] if item.number in job.skipped else route
    if item.kind is Kind.DECODE:
        return costs.parallel.decoders
    return costs.parallel.encoders if item.kind is Kind.TEXT else (0,)


def busy_s(costs: Profile, job: Job, stage: int) -> float:
    """What a request costs a stage, all in all."""
    place = Place(pp=stage)
    return sum(
        number * costs.compute_s(place, item, job)
        for item, number in items_of(costs, job)
        if stage in stages_of(costs, job, item)
    )


@dataclass(frozen=True)
class Bound:
    """Least seconds of a line.

    Attributes:
        costs: the line's. job: what all requests are like.
    """

    costs: Profile
    job: Job

    @property
    def latency(self) -> float:
        """Of one request."""
        return self._front + self._decode

    def period(self, in_flight: int) -> float:
        """Between results, with M in flight and no end of requests."""
        return max(*self._busy, self._link, self._decode, self._front / in_flight)

    def total(self, in_flight: int, requests: int) -> float:
        """From N requests' submission to the last result."""
        return max(self.limits(in_flight, requests).values())

    def limits(self, in_flight: int, requests: int) -> dict[str, float]:
        """What the total is at least, for each reason that there is.

        "compute": a stage does one thing at a time. "link": so does an edge. "decode": one request decodes at a time.
        "requests": M denoise at once, so that N do in waves.
        """
        stages = range(self.costs.parallel.pp)
        return {
            "compute": max(self._before(stage) + requests * self._busy[stage] + self._after(stage) for stage in stages),
            "link": requests * self._link,
            "decode": self._front + requests * self._decode,
            "requests": -(-requests // in_flight) * self._front + self._decode,
        }

    @cached_property
    def _busy(self) -> list[float]:
        return [busy_s(self.costs, self.job, stage) for stage in range(self.costs.parallel.pp)]

    @cached_property
    def _front(self) -> float:
        """Texts, conditioning and all steps of a request, each after the one before."""
        branches, steps, seconds = lined_branches(self.costs, self.job), steps_of(self.costs, self.job), 0.0
        for item, _ in items_of(self.costs, self.job):
            if item.kind is Kind.TEXT:
                seconds += self._crossing([(item, branches)])
                seconds += self._travel(Value.EMBEDDING, item) if self.costs.parallel.pp > 1 else 0.0
            elif item.kind is Kind.ENCODE:
                seconds += self._compute_s(0, item)
            elif item.kind is Kind.DENOISE:
                sort = self.costs.expert(self.job, item.number), item.number in self.job.skipped
                seconds += steps[sort] * self._step(item)
        back = WorkItem(Kind.DENOISE, self.job.id)
        return max(0.0, seconds - self._travel(Value.LATENTS, back))  # there is a step less to go to than steps

    def _step(self, item: WorkItem) -> float:
        """One step, with the latents' way to the next one: no way at all where a stage makes it for itself alone."""
        expert = self.costs.expert(self.job, item.number)
        both = self.costs.parallel.cfg == 2 and self.job.branches == 2 and expert not in self.job.unguided
        seconds = self._crossing([(item, forwards_of(self.costs, self.job, expert))])
        if both:
            seconds += self._travel(Value.PREDICTION, item)
        if both or len(stages_of(self.costs, self.job, item)) > 1:
            seconds += self._travel(Value.LATENTS, item)
        return seconds

    @cached_property
    def _decode(self) -> float:
        """All chunks of a request, nothing else going on."""
        chunks = [(item, number) for item, number in items_of(self.costs, self.job) if item.kind is Kind.DECODE]
        if self.costs.parallel.decodes_together:
            stages = self.costs.parallel.decoders
            return sum(number * max(self._compute_s(stage, item) for stage in stages) for item, number in chunks)
        return self._crossing(chunks) if chunks else 0.0

    def _crossing(self, items: Sequence[tuple[WorkItem, int]]) -> float:
        """Some items through the stages, one behind the other: those of one stage, and the way there and from it."""
        (first, _), (last, _) = items[0], items[-1]
        stages = stages_of(self.costs, self.job, first)
        return max(
            self._way(first, stages[:at])
            + sum(number * self._compute_s(stage, item) for item, number in items)
            + self._way(last, stages[at + 1 :])
            for at, stage in enumerate(stages)
        )

    def _way(self, item: WorkItem, stages: Sequence[int]) -> float:
        """An item through these stages, and over an edge beside each."""
        hop = self._travel(HANDED_ON[item.kind], item) if stages else 0.0
        return sum(self._compute_s(stage, item) + hop for stage in stages)

    def _before(self, stage: int) -> float:
        """Until a stage can have anything to do."""
        text = WorkItem(Kind.TEXT, self.job.id)
        return (
            self._way(text, [other for other in self.costs.parallel.encoders if other < stage])
            if self.job.texts
            else 0.0
        )

    def _after(self, stage: int) -> float:
        """From the last that a stage does to the last result."""
        parallel, last = self.costs.parallel, WorkItem(Kind.DECODE, self.job.id, self.job.chunks - 1)
        if not self.job.chunks or parallel.decodes_together:
            return 0.0
        after = [other for other in parallel.decoders if other > stage]
        return self._way(last, after) if stage in parallel.decoders else self._decode

    @cached_property
    def _link(self) -> float:
        """What a request costs the busiest of the edges from stage to stage."""
        seconds: dict[tuple[int, int], float] = defaultdict(float)
        for item, number in items_of(self.costs, self.job):
            if item.kind is not Kind.DECODE or not self.costs.parallel.decodes_together:
                for edge in pairwise(stages_of(self.costs, self.job, item)):
                    seconds[edge] += number * self._travel(HANDED_ON[item.kind], item)
        return max(seconds.values(), default=0.0)

    def _compute_s(self, stage: int, item: WorkItem) -> float:
        return self.costs.compute_s(Place(pp=stage), item, self.job)

    def _travel(self, value: Value, item: WorkItem) -> float:
        return self.costs.transfer_s(value, item, self.job)
