"""The real engine with stages that sleep: how full the schedule keeps any number of stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from cineline.bench.line import time_requests
from cineline.bench.measure import Run, Summary, interleave, others
from cineline.bench.sleeping import SleepingSpec
from cineline.core.config import ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.schedule.scheduler import speed_up_limit

COLUMNS = ("P", "M", "speed-up", "limit", "% of the limit", "others' CPU")

BASE_ITEMS = 20
"""Forwards of the run on one stage, at least: so many that its first and last message count for nothing."""


@dataclass(frozen=True)
class ScheduleCase:
    """What is timed.

    Attributes:
        stages: P.
        in_flight: M, requests at once; each is an arm.
        stage_s: seconds that a stage sleeps for one forward.
        hidden_bytes: that travel from stage to stage with a forward.
        steps: of each request.
        branches: forwards a step, 2 with guidance and 1 without.
        rounds: runs of each arm.
        high_steps: steps of the first expert, which has stages of its own then; 0 for one expert.
        waves: times M requests that are submitted at once.
        skip_share: of the steps those that are skipped; the run on one stage skips none.
    """

    stages: int
    in_flight: Sequence[int]
    stage_s: float
    hidden_bytes: int
    steps: int
    branches: int
    rounds: int
    high_steps: int = 0
    waves: int = 1
    skip_share: float = 0.0

    @property
    def base_requests(self) -> int:
        """Requests of the run on one stage."""
        return math.ceil(BASE_ITEMS / (self.steps * self.branches))

    @property
    def spec(self) -> SleepingSpec:
        """The model. All of its blocks sleep as long as all stages of one expert's line."""
        blocks = math.prod(len(group) for group in self.parallel.groups)  # which both groups can share out evenly
        each = self.stages * self.stage_s / blocks
        return SleepingSpec(blocks, each, self.hidden_bytes, self.high_steps, self.steps, self.skip_share)

    def requests(self, count: int) -> int:
        """Requests of a run with `count` in flight."""
        return self.waves * count

    @property
    def parallel(self) -> ParallelConfig:
        """How the stages are used."""
        if not self.high_steps:
            return ParallelConfig(pp=self.stages)
        split = ParallelConfig(pp=self.stages, expert_placement="split")
        return split.placed(self.stages, self.high_steps / self.steps)

    def limit(self, count: int) -> float:
        """Throughput against one device: of the formula, or with split experts that of the busier group; times what the
        steps that are skipped allow."""
        computed = 1 - len(self.spec.skipped(self.steps)) / self.steps
        return self._limit_of_line(count) / computed

    def _limit_of_line(self, count: int) -> float:
        if not self.high_steps:
            return float(speed_up_limit(self.stages, count, self.branches))
        high, low = (len(group) for group in self.parallel.groups)
        return self.steps / max(self.high_steps / high, (self.steps - self.high_steps) / low)


@dataclass(frozen=True)
class Timed:
    """Runs on one stage, and by number in flight on all; each round has one of each."""

    base: list[Run]
    arms: dict[int, list[Run]]


def time_schedule(case: ScheduleCase, tell: Callable[[str], None]) -> Timed:
    """Time all; the fill of the line is included.

    What one device takes is measured in the same rounds, since a sleep is longer than it was asked to be, by how much
    the machine and the minute decide.
    """
    request = VideoRequest(
        prompt="sleep", num_inference_steps=case.steps, guidance_scale=float(case.branches), decode=False
    )
    arms: dict[str, Callable[[], float]] = {}
    with ExitStack() as stack:

        def arm(
            spec: SleepingSpec, parallel: ParallelConfig, in_flight: int | None, requests: int
        ) -> Callable[[], float]:
            engine = stack.enter_context(Engine(spec, parallel, device="cpu", in_flight=in_flight))
            time_requests(engine, [request.model_copy(update={"num_inference_steps": 1})])
            return partial(time_requests, engine, [request] * requests)

        arms["one stage"] = arm(replace(case.spec, skip_share=0.0), ParallelConfig(), None, case.base_requests)
        for count in case.in_flight:
            arms[f"M={count}"] = arm(case.spec, case.parallel, None if case.high_steps else count, case.requests(count))
        runs = interleave(arms, case.rounds, tell)
    return Timed(runs["one stage"], {count: runs[f"M={count}"] for count in case.in_flight})


def rows(case: ScheduleCase, timed: Timed) -> list[list[str]]:
    """A row of `COLUMNS` for each M."""
    found = []
    for count, own in timed.arms.items():
        limit = case.limit(count)
        work = case.requests(count) / case.base_requests
        speed_ups = [work * base.seconds / run.seconds for base, run in zip(timed.base, own, strict=True)]
        share = Summary.of([100 * speed_up / limit for speed_up in speed_ups])
        found.append(
            [str(case.stages), str(count), str(Summary.of(speed_ups)), f"{limit:.2f}", str(share), others(own)]
        )
    return found
