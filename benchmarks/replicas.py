"""Engines side by side behind one queue, with stages that sleep: several against one."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from cineline.bench.measure import Run, Summary, interleave, others, ratios
from cineline.bench.schedule import ScheduleCase
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.engine.handle import RequestHandle
from cineline.engine.launch import Launcher
from cineline.engine.replica import Replica
from cineline.engine.replicas import Replicas

COLUMNS = ("replicas", "launcher", "seconds", "x one", "others' CPU")

POLL_S = 0.005
SPARE = 2
"""Requests that an engine has beyond those in flight, as in the service."""

STORE_BYTES = 80 * 2**20
"""Of Ray's object store, in which nothing large is put."""


@dataclass(frozen=True)
class ReplicasCase:
    """What is timed: each arm once in each of the rounds.

    Attributes:
        schedule: the sleeping line of each replica, its M (`in_flight`, one) and the rounds. replicas: of the second
            arm. requests: of a run. launcher: of all engines.
    """

    schedule: ScheduleCase
    replicas: int
    requests: int
    launcher: Launcher

    @property
    def room(self) -> int:
        """Requests that an engine is given at once."""
        return self.schedule.in_flight[0] + SPARE

    def make(self, replica: Replica) -> Engine:
        """One of the engines."""
        schedule = self.schedule
        return Engine(
            schedule.spec,
            schedule.parallel,
            device="cpu",
            in_flight=schedule.in_flight[0],
            launcher=self.launcher,
            replica=replica,
        )


def time_replicas(case: ReplicasCase, tell: Callable[[str], None]) -> dict[int, list[Run]]:
    """Runs by number of replicas."""
    schedule = case.schedule
    request = VideoRequest(
        prompt="sleep", num_inference_steps=schedule.steps, guidance_scale=float(schedule.branches), decode=False
    )
    arms: dict[str, Callable[[], float]] = {}
    with ExitStack() as stack:
        if case.launcher == "ray":
            stack.enter_context(_cluster((1 + case.replicas) * schedule.stages))
        for count in (1, case.replicas):
            engines = stack.enter_context(Replicas(case.make, count))
            warm_up = request.model_copy(update={"num_inference_steps": 1})
            _time(engines, [warm_up] * count, count)
            arms[str(count)] = partial(_time, engines, [request] * case.requests, case.room * count)
        runs = interleave(arms, schedule.rounds, tell)
    return {int(count): own for count, own in runs.items()}


def rows(case: ReplicasCase, results: dict[int, list[Run]]) -> list[list[str]]:
    """A row of `COLUMNS` for each number of replicas."""
    return [
        [
            str(count),
            case.launcher,
            str(Summary.of([run.seconds for run in own])),
            str(ratios(results[1], own)),
            others(own),
        ]
        for count, own in results.items()
    ]


def _time(engines: Replicas, requests: list[VideoRequest], room: int) -> float:
    """Seconds for all, of which no more than `room` are with the engines at once; the rest is the queue."""
    started = time.monotonic()
    queue, running = deque(requests), list[RequestHandle]()
    while queue or running:
        while queue and len(running) < room:
            running.append(engines.submit(queue.popleft()))
        time.sleep(POLL_S)
        for handle in [handle for handle in running if handle.done]:
            handle.result(0)
            running.remove(handle)
    return time.monotonic() - started


@contextmanager
def _cluster(cores: int) -> Iterator[None]:
    """A Ray cluster of this machine, which believes to have so many cores."""
    import ray

    ray.init(
        num_cpus=cores,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()
