"""The simulator beside the traced engine, both on stages that sleep."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cineline.bench.line import time_requests
from cineline.bench.measure import Run, Summary, others, run_quietly
from cineline.bench.sleeping import SleepingSpec
from cineline.core.config import ParallelConfig, Place
from cineline.core.request import Branch, Job, Kind, VideoRequest, WorkItem
from cineline.core.trace import slice_name
from cineline.engine.api import Engine
from cineline.schedule.simulator import simulate
from cineline.schedule.words import Value

REQUESTS = ((6, 2), (3, 1), (8, 2), (4, 2), (5, 1), (7, 2))
"""Steps and forwards a step (2 with guidance) of the requests, which are submitted at once."""

CALIBRATION_STEPS = 20

COLUMNS = ("arm", "M", "simulated s", "measured s", "error", "others' CPU")


@dataclass(frozen=True)
class SimulatorCase:
    """What is compared.

    Attributes:
        arms: divisions. in_flight: M, requests at once; each is run with each arm.
        stage_s: seconds that a stage sleeps for one forward.
        hidden_bytes: that travel from stage to stage with a forward.
        rounds: runs of each.
    """

    arms: Sequence[ParallelConfig]
    in_flight: Sequence[int]
    stage_s: float
    hidden_bytes: int
    rounds: int

    def spec(self, parallel: ParallelConfig) -> SleepingSpec:
        """A block a stage."""
        return SleepingSpec(parallel.pp, self.stage_s, self.hidden_bytes)


@dataclass(frozen=True)
class Constants:
    """What sleeping stages cost beside their sleep, in seconds: measured on this machine, two ranks, one request.

    Attributes:
        send_s: an item on a rank that sends hidden states: sleep that lasts longer than asked, dispatch, trace, and
            the send, which takes the sender's own time. last_s: an item on the last rank.
        forward_s: hidden states to the next rank, beyond that. back_s: latents (0.4 MB) to another rank.
    """

    send_s: float
    last_s: float
    forward_s: float
    back_s: float


@dataclass(frozen=True)
class Comparison:
    """One arm at one M."""

    parallel: str
    in_flight: int
    simulated_s: float
    runs: list[Run]

    @property
    def measured(self) -> Summary:
        """Seconds from the first submit to the last result."""
        return Summary.of([run.seconds for run in self.runs])

    @property
    def error(self) -> float:
        """Of the simulation, as a share of what was measured."""
        return self.simulated_s / self.measured.median - 1


@dataclass(frozen=True)
class SleepingProfile:
    """`simulator.Profile` of sleeping stages, which hold nothing."""

    parallel: ParallelConfig
    case: SimulatorCase
    constants: Constants

    def expert(self, job: Job, step: int) -> int:
        return 0

    def compute_s(self, place: Place, item: WorkItem, job: Job) -> float:
        if item.kind is not Kind.DENOISE:
            return 0.0
        is_last = place.pp == self.parallel.pp - 1
        return self.case.stage_s + (self.constants.last_s if is_last else self.constants.send_s)

    def transfer_s(self, value: Value, item: WorkItem, job: Job) -> float:
        if item.kind is not Kind.DENOISE:
            return 0.0
        return self.constants.forward_s if value is Value.HIDDEN else self.constants.back_s

    def resident_bytes(self, place: Place) -> int:
        return 0

    def admitted_bytes(self, place: Place, job: Job) -> int:
        return 0

    def working_bytes(self, place: Place, item: WorkItem, job: Job) -> int:
        return 0


def compare(case: SimulatorCase, tell: Callable[[str], None]) -> tuple[Constants, list[Comparison]]:
    """Measure the constants, then simulate and run every arm at every M."""
    constants = measure_constants(case)
    tell(f"constants: {constants}")
    wanted = [_request(steps, branches) for steps, branches in REQUESTS]
    found = []
    for parallel in case.arms:
        spec = case.spec(parallel)
        jobs = [spec.resolve(request, number) for number, request in enumerate(wanted)]
        for count in case.in_flight:
            simulated = simulate(SleepingProfile(parallel, case, constants), jobs, count).makespan_s
            with tempfile.TemporaryDirectory() as folder:
                runs = _traced_runs(spec, parallel, count, wanted, case.rounds, Path(folder) / "trace.json")
            found.append(Comparison(str(parallel), count, simulated, runs))
            tell(f"{parallel}, M={count}: simulated {simulated:.2f} s, measured {found[-1].measured} s")
    return constants, found


def rows(found: Sequence[Comparison]) -> list[list[str]]:
    """A row of `COLUMNS` each."""
    return [
        [
            *(one.parallel, str(one.in_flight), f"{one.simulated_s:.2f}", str(one.measured)),
            *(f"{one.error:+.1%}", others(one.runs)),
        ]
        for one in found
    ]


def measure_constants(case: SimulatorCase) -> Constants:
    """One request at a time through two ranks, so that every wait in the trace is one transfer.

    With guidance, the head's second forward follows the first at once: what is between their starts beyond the sleep
    is the item's own. Without it, each start follows the end of an item on the other rank.
    """
    parallel = ParallelConfig(pp=2)
    wanted = [_request(1, 1), _request(CALIBRATION_STEPS, 2), _request(CALIBRATION_STEPS, 1)]
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with Engine(case.spec(parallel), parallel, device="cpu", in_flight=1, trace=trace) as engine:
            time_requests(engine, wanted)
        spans = _spans(trace)
    steps = range(1, CALIBRATION_STEPS)
    cond, uncond, alone = (
        [
            [spans[rank, slice_name(WorkItem(Kind.DENOISE, request, step, branch))] for step in steps]
            for rank in range(parallel.pp)
        ]
        for request, branch in ((1, Branch.COND), (1, Branch.UNCOND), (2, Branch.COND))
    )
    send_s = _median_gap(cond[0], uncond[0]) - case.stage_s
    dispatch_s = statistics.median(after[0] - before[1] for before, after in zip(cond[0], uncond[0], strict=True))
    last_s = statistics.median(end - start for start, end in cond[1]) - case.stage_s + dispatch_s
    forward_s = _median_gap(alone[0], alone[1]) - case.stage_s - send_s
    back_s = _median_gap(alone[1][:-1], alone[0][1:]) - case.stage_s - last_s
    return Constants(*(max(0.0, seconds) for seconds in (send_s, last_s, forward_s, back_s)))


def _traced_runs(
    spec: SleepingSpec,
    parallel: ParallelConfig,
    in_flight: int,
    wanted: Sequence[VideoRequest],
    rounds: int,
    trace: Path,
) -> list[Run]:
    with Engine(spec, parallel, device="cpu", in_flight=in_flight, trace=trace) as engine:
        time_requests(engine, [_request(1, 2)])
        return [run_quietly(partial(time_requests, engine, wanted)) for _ in range(rounds)]


def _spans(trace: Path) -> dict[tuple[int, str], tuple[float, float]]:
    """Start and end of every item, in seconds, by rank and name."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    return {(event["tid"], event["name"]): (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6) for event in events}


def _median_gap(before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]]) -> float:
    """Seconds from start to start."""
    return statistics.median(late[0] - early[0] for early, late in zip(before, after, strict=True))


def _request(steps: int, branches: int) -> VideoRequest:
    return VideoRequest(prompt="sleep", num_inference_steps=steps, guidance_scale=float(branches), decode=False)
