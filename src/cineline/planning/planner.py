"""Which way to divide a model over given devices: every set of axes, cut, costed and compared (no torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from cineline.core.config import Dtype, ParallelConfig
from cineline.core.request import Job, VideoRequest
from cineline.errors import InvalidConfig
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan.spec import WanSpec
from cineline.planning.fit import DECODES, Fit, fits
from cineline.planning.forecast import Forecast, forecast
from cineline.planning.hardware import Device, Link
from cineline.planning.line import PlannedLine
from cineline.schedule.scheduler import default_in_flight

MOST_LANES = 8
"""Ranks of a stage that are tried."""


@dataclass(frozen=True)
class Task:
    """What is planned for.

    Attributes:
        spec: the model. devices: all of them, in the order of the stages. link: between them.
        job: the request. requests: how many such wait at once.
        dtype, vae_dtype: as in `DeviceConfig`.
        in_flight: requests that denoise at once; None for as many as fill the line and fit.
    """

    spec: WanSpec
    devices: Sequence[Device]
    link: Link
    job: Job
    requests: int = 8
    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype = "float32"
    in_flight: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"{name}={value} is below 1: give 1 or more.")


def planned_job(spec: WanSpec, fields: dict[str, int | float]) -> Job:
    """The request as a job; an image-to-video model gets an image of one pixel's worth of memory."""
    if spec.kind == "i2v":
        defaults = {name: int(spec.defaults[name]) for name in ("height", "width")}
        return spec.resolve(VideoRequest(prompt="planned", image=Image.new("RGB", (1, 1)), **{**defaults, **fields}), 0)
    return spec.resolve(VideoRequest(prompt="planned", **fields), 0)


@dataclass(frozen=True)
class Plan:
    """One way to do it.

    Attributes:
        line: axes, cut and costs of one replica. replicas: engines side by side, each with its own devices.
        in_flight: M of each. peaks: bytes on each stage. forecast: of one replica, with its share of the requests.
        short_of: requests in flight that memory does not allow though they would fill the line.
    """

    line: PlannedLine
    replicas: int
    in_flight: int
    peaks: tuple[int, ...]
    forecast: Forecast
    short_of: int

    @property
    def parallel(self) -> ParallelConfig:
        return self.line.parallel

    @property
    def latency(self) -> float:
        """Seconds of one request alone."""
        return self.forecast.latency

    @property
    def period(self) -> float:
        """Seconds between results, of all replicas together."""
        return self.forecast.period / self.replicas

    @property
    def total(self) -> float:
        """Seconds until all waiting requests are done."""
        return self.forecast.total

    @property
    def peak(self) -> int:
        """Bytes of the fullest device."""
        return max(self.peaks)

    @property
    def exact(self) -> bool:
        """Whether its results are, bit for bit, one device's (where products keep their bits)."""
        axes = self.parallel
        decodes = self.parallel.vae_decode in DECODES or (axes.vae_decode == "rows" and axes.pp == 1)
        return axes.ring == axes.tp == 1 and decodes

    @property
    def limit(self) -> str:
        """What keeps it from being faster."""
        if self.short_of:
            return "memory"
        return self.forecast.limit


@dataclass(frozen=True)
class Planning:
    """All plans that fit, and the chosen ones.

    Attributes:
        best: soonest done with all requests; exact if any exact one fits.
        latency, throughput, memory: best at one of these.
        single: soonest of those that are one engine, which `Engine(parallel="auto")` can be.
        replicas: of whole models, a device each, where one device has room.
        others: the best of every other set of axes.
    """

    best: Plan
    latency: Plan
    throughput: Plan
    memory: Plan
    single: Plan | None
    replicas: Plan | None
    others: Sequence[Plan]


def plan(task: Task) -> Planning:
    """Compare all ways.

    Raises:
        InvalidConfig: nothing fits; says what is missing.
    """
    tried = [attempt for parallel, replicas in axes_of(task) for attempt in _attempts(task, parallel, replicas)]
    found = [attempt for attempt in tried if isinstance(attempt, Plan)]
    if not found:
        raise InvalidConfig(_shortage(task, [attempt for attempt in tried if isinstance(attempt, Fit)]))
    exact = [each for each in found if each.exact] or found
    best = min(exact, key=lambda each: (round(each.total, 3), each.peak))
    whole = [each for each in exact if each.replicas == len(task.devices) > 1]
    return Planning(
        best=best,
        latency=min(exact, key=lambda each: (round(each.latency, 3), each.peak)),
        throughput=min(exact, key=lambda each: (round(each.period, 3), each.peak)),
        memory=_least_memory(task, exact),
        single=min((each for each in exact if each.replicas == 1), key=lambda each: each.total, default=None),
        replicas=min(whole, key=lambda each: each.total, default=None),
        others=_best_of_each(found),
    )


def _best_of_each(found: Sequence[Plan]) -> list[Plan]:
    """Of each set of axes the soonest, in order."""
    chosen: dict[tuple[int, str], Plan] = {}
    for each in found:
        key = each.replicas, axes_text(each.parallel)
        if key not in chosen or each.total < chosen[key].total:
            chosen[key] = each
    return sorted(chosen.values(), key=lambda each: each.total)


def axes_text(parallel: ParallelConfig) -> str:
    """The axes without the cut."""
    return str(parallel)


def axes_of(task: Task) -> Iterator[tuple[ParallelConfig, int]]:
    """Every product of axes over the devices, and the number of replicas; lanes and replicas of like devices only."""
    devices = len(task.devices)
    alike = len(set(task.devices)) == 1
    for replicas in range(1, devices + 1):
        if devices % replicas or (replicas > 1 and not alike):
            continue
        ranks = devices // replicas
        for cfg in (1, 2) if task.job.branches == 2 and alike else (1,):
            for lanes in _lanes(ranks // cfg, alike) if ranks % cfg == 0 else ():
                yield from ((parallel, replicas) for parallel in _placements(task, cfg, lanes, ranks))


def _lanes(ranks: int, alike: bool) -> Iterator[dict[str, int]]:
    """Axes inside a stage; one of them beside Ulysses at most."""
    yield {}
    if not alike:
        return
    for ulysses in range(1, min(ranks, MOST_LANES) + 1):
        for axis in ("ring", "tp"):
            for size in range(1, min(ranks, MOST_LANES) // ulysses + 1):
                lanes = ulysses * size
                if lanes > 1 and ranks % lanes == 0 and not (size == 1 and axis == "tp"):
                    yield {"ulysses": ulysses, axis: size}


def _placements(task: Task, cfg: int, lanes: dict[str, Any], ranks: int) -> Iterator[ParallelConfig]:
    stages = ranks // cfg
    for size in lanes.values():
        stages //= size
    ulysses, ring, tp = (lanes.get(axis, 1) for axis in ("ulysses", "ring", "tp"))
    bases = [ParallelConfig(pp=stages, cfg=cfg, ulysses=ulysses, ring=ring, tp=tp)]
    if len(task.spec.experts) == 2 and stages > 1:
        split = replace(bases[0], expert_placement="split")
        bases += [replace(split, high_stages=high) for high in range(1, stages)]
    for base in bases:
        try:
            placed = task.spec.place(base)
            placed.blocks(task.spec.layers)
        except InvalidConfig:
            continue
        yield replace(placed, split=None, text_split=None, vae_split=None)


def _attempts(task: Task, parallel: ParallelConfig, replicas: int) -> Iterator[Plan | Fit]:
    """The plans of these axes that fit, or the cut that comes nearest to it."""
    line = _line(task, parallel)
    limits = [device.memory for device in line.devices]
    wanted = wanted_in_flight(task, parallel)
    share = -(-task.requests // replicas)
    nearest: Fit | None = None
    found = False
    for ways in (DECODES, ("rows",)):
        if ways == ("rows",) and (found or parallel.pp == 1):
            break
        for in_flight in _counts_down(task, min(wanted, share)):
            for fit in fits(line, in_flight, limits, ways):
                if not fit.excess:
                    found = True
                    yield _plan(fit, replicas, share, min(wanted, share) - in_flight)
                elif nearest is None or fit.excess < nearest.excess:
                    nearest = fit
            if found:
                break
    if not found and nearest is not None:
        yield nearest


def _counts_down(task: Task, wanted: int) -> Iterator[int]:
    yield from [wanted] if task.in_flight is not None else range(wanted, 0, -1)


def wanted_in_flight(task: Task, parallel: ParallelConfig) -> int:
    """As many requests as fill the line."""
    branches = 1 if parallel.cfg == 2 else task.job.branches
    return task.in_flight or sum(default_in_flight(len(group), branches) for group in parallel.groups)


def _line(task: Task, parallel: ParallelConfig) -> PlannedLine:
    costs = ModelCosts.of(task.spec, task.dtype, task.vae_dtype)
    whole = len(task.devices) == parallel.pp
    devices = tuple(task.devices if whole else [task.devices[0]] * parallel.pp)
    return PlannedLine(task.spec, costs, parallel, devices, task.link, task.job)


def _plan(fit: Fit, replicas: int, requests: int, short_of: int) -> Plan:
    made = forecast(fit.line, fit.in_flight, requests)
    return Plan(fit.line, replicas, fit.in_flight, tuple(fit.peaks()), made, short_of)


def _least_memory(task: Task, found: Sequence[Plan]) -> Plan:
    """The plan whose fullest device holds least; cut anew for memory alone, with one request in flight."""
    least = min(found, key=lambda each: each.peak)
    widest = max(found, key=lambda each: each.parallel.pp)
    for base in (least, widest):
        nothing = [1.0] * base.parallel.pp  # no room anywhere: each cut is then as even as can be
        bare = _line(task, replace(base.parallel, split=None, text_split=None, vae_split=None, vae_decode="layers"))
        for fit in fits(bare, task.in_flight or 1, nothing, DECODES):
            peaks, devices = fit.peaks(), bare.devices
            fitting = all(peak <= device.memory for peak, device in zip(peaks, devices, strict=True))
            if fitting and max(peaks) < least.peak:
                least = _plan(fit, base.replicas, -(-task.requests // base.replicas), 0)
    return least


def _shortage(task: Task, nearest: Sequence[Fit]) -> str:
    """One sentence: what is missing, and by how much."""
    names = f"{len(task.devices)} x {task.devices[0].name}" if len(set(task.devices)) == 1 else "these devices"
    if not nearest:
        return f"No set of axes divides the model over {names}: use fewer devices."
    fit = min(nearest, key=lambda each: each.excess)
    peaks = fit.peaks()
    stage = max(range(len(peaks)), key=lambda number: peaks[number] - fit.line.devices[number].memory)
    device = fit.line.devices[stage]
    return (
        f"{task.spec.folder} does not fit {names}: the nearest plan ({fit.line.parallel}) needs "
        f"{peaks[stage] / 1e9:.1f} GB on stage {stage}, {(peaks[stage] - device.memory) / 1e9:.1f} GB more than the "
        f"{device.memory / 1e9:.0f} GB of its {device.name}: use more or larger devices, or a smaller video."
    )
