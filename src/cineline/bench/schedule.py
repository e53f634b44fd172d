"""The real engine with stages that sleep: how full the schedule keeps any number of stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from cineline.bench.line import time_requests
from cineline.bench.measure import Run, interleave
from cineline.bench.sleeping import SleepingSpec
from cineline.config import ParallelConfig
from cineline.engine import Engine
from cineline.request import VideoRequest


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
    """

    stages: int
    in_flight: Sequence[int]
    stage_s: float
    hidden_bytes: int
    steps: int
    branches: int
    rounds: int

    def one_stage_s(self, count: int) -> float:
        """Seconds that one device would sleep for `count` requests."""
        return count * self.steps * self.branches * self.stages * self.stage_s


def time_schedule(case: ScheduleCase, tell: Callable[[str], None]) -> dict[int, list[Run]]:
    """Runs by number in flight; the fill of the line is included."""
    spec = SleepingSpec(case.stages, case.stage_s, case.hidden_bytes)
    request = VideoRequest(
        prompt="sleep", num_inference_steps=case.steps, guidance_scale=float(case.branches), decode=False
    )
    arms: dict[str, Callable[[], float]] = {}
    with ExitStack() as stack:
        for count in case.in_flight:
            engine = Engine(spec, ParallelConfig(pp=case.stages), device="cpu", in_flight=count)
            stack.enter_context(engine)
            time_requests(engine, [request.model_copy(update={"num_inference_steps": 1})])
            arms[f"M={count}"] = partial(time_requests, engine, [request] * count)
        runs = interleave(arms, case.rounds, tell)
    return {count: runs[f"M={count}"] for count in case.in_flight}
