"""Which way to divide a model over given devices: every set of axes, cut, costed and compared (no torch).

The simulator says how long a plan takes. Plans are simulated in the order of what they take at least, until the next
one's bound is above what the best one takes: so the best is the best of all, though most are never simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from cineline.core.config import DeviceConfig, Dtype, ParallelConfig
from cineline.core.costs import LineCosts
from cineline.core.family import PlannedFamily
from cineline.core.hardware import Device, Link
from cineline.core.request import Job
from cineline.errors import InvalidConfig, shown
from cineline.planning.fit import DECODES, Fit, fits
from cineline.planning.plan import Plan
from cineline.schedule.scheduler import usual_in_flight

MOST_LANES = 8
"""Ranks of a stage that are tried."""

WORTH = 0.01
"""Share by which a period must be shorter to be looked for: how exact the simulated periods are themselves."""

OTHERS = 5
"""Sets of axes that are shown beside the best plan's."""


@dataclass(frozen=True)
class Task:
    """What is planned for.

    Attributes:
        spec: the model. devices: all of them, in the order of the stages. link: between them.
        job: the request. requests: how many such wait at once.
        in_flight: None for as many as fill the line and fit.
        dtype, vae_dtype: as in `DeviceConfig`.
    """

    spec: PlannedFamily
    devices: Sequence[Device]
    link: Link
    job: Job
    requests: int = 8
    in_flight: Annotated[int | None, "Requests that denoise at once"] = None
    dtype: Dtype = "bfloat16"
    vae_dtype: Dtype = DeviceConfig.vae_dtype

    def __post_init__(self) -> None:
        for name in ("requests", "in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"{name}={shown(value)} is below 1: give 1 or more.")


def planned_job(spec: PlannedFamily, fields: Mapping[str, Any]) -> Job:
    """The model's example with these fields, as a job."""
    return spec.resolve(spec.example(fields), 0)


@dataclass(frozen=True)
class Planning:
    """The chosen ones of the plans that fit.

    Attributes:
        best: soonest done with all requests; exact if any exact one fits.
        latency, throughput, memory: best at one of these.
        single: soonest of those that are one engine, which `Engine(parallel="auto")` can be.
        replicas: of whole models, a device each, where one device has room.
        others: the soonest of each other set of axes, of which the first few.
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
    found = plans_of(task)
    exact = [each for each in found if each.exact] or found
    best = soonest(exact)
    assert best is not None
    return Planning(
        best=best,
        latency=_first(exact, lambda each: each.bound.latency, lambda each: each.latency),
        throughput=_first(exact, lambda each: each.least_period, lambda each: each.period, WORTH),
        memory=_least_memory(task, exact),
        single=soonest([each for each in exact if each.replicas == 1]),
        replicas=soonest([each for each in exact if each.replicas == len(task.devices) > 1]),
        others=_best_of_others(found, best),
    )


def plans_of(task: Task) -> list[Plan]:
    """All plans that fit.

    Raises:
        InvalidConfig: nothing fits; says what is missing.
    """
    tried = [attempt for parallel, replicas in axes_of(task) for attempt in _attempts(task, parallel, replicas)]
    found = [attempt for attempt in tried if isinstance(attempt, Plan)]
    if not found:
        raise InvalidConfig(_shortage(task, [attempt for attempt in tried if isinstance(attempt, Fit)]))
    return found


def soonest(plans: Sequence[Plan]) -> Plan | None:
    """The plan that is first done with all requests; of equals the one that takes less memory."""
    return _first(plans, lambda each: each.least_total, lambda each: each.total) if plans else None


def _first(
    plans: Sequence[Plan], bound: Callable[[Plan], float], seconds: Callable[[Plan], float], worth: float = 0.0
) -> Plan:
    """The plan of the fewest seconds, of which only so many are asked as may be better by more than a share `worth`."""
    best, *others = sorted(plans, key=bound)
    for each in others:
        if round(bound(each), 3) > round((1 - worth) * seconds(best), 3):
            break
        best = min(best, each, key=lambda one: (round(seconds(one), 3), one.peak))
    return best


def _best_of_others(plans: Sequence[Plan], best: Plan) -> list[Plan]:
    """Of each set of axes beside the best plan's the soonest plan, in order; the first of them only."""
    chosen: dict[tuple[int, str], Plan] = {}
    for each in sorted(plans, key=lambda each: each.least_total):
        in_order = sorted(chosen.values(), key=lambda each: each.total)
        if len(in_order) >= OTHERS and each.least_total > in_order[OTHERS - 1].total:
            break
        axes = axes_of_plan(each)
        if axes != axes_of_plan(best) and (axes not in chosen or each.total < chosen[axes].total):
            chosen[axes] = each
    return sorted(chosen.values(), key=lambda each: each.total)[:OTHERS]


def axes_of_plan(plan: Plan) -> tuple[int, str]:
    """Replicas, and axes without the cut."""
    return plan.replicas, str(plan.parallel)


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
    if stages > 1:
        split = replace(bases[0], expert_placement="split")
        bases += [replace(split, high_stages=high) for high in range(1, stages)]
    for base in bases:
        try:
            placed = task.spec.place(base)
            placed.blocks(task.spec.costs(task.dtype, task.vae_dtype).blocks)
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
    return task.in_flight or usual_in_flight(parallel, task.job)


def _line(task: Task, parallel: ParallelConfig) -> LineCosts:
    whole = len(task.devices) == parallel.pp
    devices = task.devices if whole else [task.devices[0]] * parallel.pp
    return task.spec.line(parallel, devices, task.link, task.job, task.dtype, task.vae_dtype)


def _plan(fit: Fit, replicas: int, requests: int, short_of: int) -> Plan:
    return Plan(fit.line, replicas, fit.in_flight, requests, tuple(fit.peaks()), short_of)


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
