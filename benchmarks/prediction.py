"""The planner beside the engine, on this machine's CPU: seconds, bytes of weights, peak memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.calibrate import calibrate_apart
from benchmarks.footprint import bare_bytes, engine_and_ranks, memory_returned, resident_bytes
from benchmarks.simulator import SimulatorCase, measure_constants
from cineline.bench.line import time_requests
from cineline.bench.measure import Run, Summary, others, run_quietly
from cineline.core.config import DeviceConfig, ParallelConfig, Place
from cineline.core.hardware import Device, Link
from cineline.core.request import Job, VideoRequest
from cineline.families.wan.costs.line import PlannedLine
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.planning.cut import default_cut
from cineline.schedule.simulator import simulate

HIDDEN_BYTES = 3_000_000

COLUMNS = ("P", "planned s", "measured s", "error", "weights", "plan MB", "in use", "error", "kept", "others' CPU")


@dataclass(frozen=True)
class PredictionCase:
    """What is planned and run.

    Attributes:
        kind: of the model, 8 blocks of width 512 with random weights.
        stages: P, one after another. requests: at once, in flight too.
        steps: solver steps of a request of 1,536 tokens, decoded.
        rounds: runs of each.
    """

    kind: WanKind
    stages: Sequence[int]
    requests: int
    steps: int
    rounds: int

    @property
    def model(self) -> RandomConfig:
        transformer = RandomConfig(self.kind, layers=8, heads=4, head_dim=128, ffn_dim=2048)
        return replace(transformer, text_layers=8, text_width=512, vae_width=16)

    def request(self, seed: int) -> VideoRequest:
        """With guidance."""
        side = 512 if self.kind == "ti2v" else 256
        scales = {"guidance_scale": 4.0} | ({} if self.kind == "ti2v" else {"guidance_scale_2": 3.0})
        sizes = {"height": side, "width": side, "num_frames": 21, "num_inference_steps": self.steps}
        return VideoRequest(prompt="a red square", seed=seed, **sizes, **scales)


@dataclass(frozen=True)
class Prediction:
    """One number of stages.

    Attributes:
        predicted_s: simulated on the planner's costs. runs: measured, from the first submit to the last result.
        weights, read: bytes by rank, computed and counted.
        peaks, in_use, resident: most bytes by rank: computed; and measured beyond a rank with next to no model, where
            freed memory is given back at once, and as the allocator keeps it in the runs that are timed.
    """

    stages: int
    predicted_s: float
    runs: Sequence[Run]
    weights: Sequence[int]
    read: Sequence[int]
    peaks: Sequence[int]
    in_use: Sequence[int]
    resident: Sequence[int]


def compare(case: PredictionCase, tell: Callable[[str], None]) -> Iterator[Prediction]:
    """Measure this machine's rates with the model's own modules, plan, then run."""
    config = DeviceConfig("cpu", pin_cores=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_random_checkpoint(Path(temporary) / "model", case.model)
        spec = WanSpec.open(folder)
        jobs = [spec.resolve(case.request(seed), seed) for seed in range(case.requests)]
        line = _plan(spec, 1, jobs[0], Device("cpu", 1e12), Link("none", 1e12))
        tell("rates of this machine")
        device, link = calibrate_apart(line, config), _link()
        for stages in case.stages:
            planned = _plan(spec, stages, jobs[0], device, link)
            simulated = simulate(planned, jobs, case.requests)
            tell(f"pp={stages}: {simulated.makespan_s:.1f} s predicted")
            yield _run(case, folder, planned, simulated.makespan_s, config)


def rows(found: Sequence[Prediction]) -> Iterator[list[str]]:
    """A row of `COLUMNS` each."""
    for row in found:
        seconds = Summary.of([run.seconds for run in row.runs])
        planned, in_use, kept = (
            ", ".join(f"{size / 1e6:.0f}" for size in sizes) for sizes in (row.peaks, row.in_use, row.resident)
        )
        errors = (computed / used - 1 for computed, used in zip(row.peaks, row.in_use, strict=True))
        yield [
            *(str(row.stages), f"{row.predicted_s:.1f}", str(seconds), f"{row.predicted_s / seconds.median - 1:+.1%}"),
            "equal" if list(row.weights) == list(row.read) else "DIFFERENT",
            *(planned, in_use, ", ".join(f"{error:+.1%}" for error in errors), kept, others(row.runs)),
        ]


def _link() -> Link:
    """What gloo makes of a message between two ranks here."""
    found = measure_constants(SimulatorCase([ParallelConfig(pp=2)], [1], 0.02, HIDDEN_BYTES, 1))
    seconds = found.send_s - found.last_s + found.forward_s
    return Link("gloo", HIDDEN_BYTES / max(seconds, 1e-4), latency_s=0.0)


def _plan(spec: WanSpec, stages: int, job: Job, device: Device, link: Link) -> PlannedLine:
    costs = ModelCosts.of(spec, "float32", "float32")
    parallel = default_cut(costs, spec.place(ParallelConfig(pp=stages)))
    return PlannedLine(spec, costs, parallel, (device,) * stages, link, job)


def _run(case: PredictionCase, folder: Path, line: PlannedLine, predicted_s: float, config: DeviceConfig) -> Prediction:
    places = [Place(pp=stage) for stage in range(line.parallel.pp)]
    runs, resident, read = _measure(case, folder, len(places), config, case.rounds)
    with memory_returned():
        _, in_use, _ = _measure(case, folder, len(places), config, 1)
    return Prediction(
        len(places),
        predicted_s,
        runs,
        weights=[line.costs.held(line.parallel, place).total for place in places],
        read=read,
        peaks=[line.peak_bytes(place, case.requests) for place in places],
        in_use=in_use,
        resident=resident,
    )


def _measure(
    case: PredictionCase, folder: Path, stages: int, config: DeviceConfig, rounds: int
) -> tuple[list[Run], list[int], list[int]]:
    """Timed runs; each rank's most bytes, and those of weights that it read."""
    bare = bare_bytes(folder.parent, case.kind, stages, config, "most")
    requests = [case.request(seed) for seed in range(case.requests)]
    with engine_and_ranks(folder, ParallelConfig(pp=stages), config, case.requests) as (engine, pids):
        time_requests(engine, [requests[0].model_copy(update={"num_inference_steps": 1})])
        runs = [run_quietly(partial(time_requests, engine, requests)) for _ in range(rounds)]
        resident = [resident_bytes(pid, "most") - own for pid, own in zip(pids, bare, strict=True)]
        return runs, resident, list(engine.bytes_read)
