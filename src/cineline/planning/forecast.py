"""What a planned line makes of requests: seconds of one, of many, and what limits it (closed formulas; no torch).

Legend: P stages, M requests in flight, N requests that wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cineline.core.request import Job, Kind, WorkItem
from cineline.planning.line import PlannedLine
from cineline.schedule.words import Value


@dataclass(frozen=True)
class Forecast:
    """Seconds.

    Attributes:
        latency: of one request alone.
        period: between results, with M in flight and no end of requests.
        total: from N requests' submission to the last result.
        busy: of each stage, for one request.
        limit: what the period is made of: "compute" (the busiest stage), "link", "requests" (too few in
            flight), or "decode" (of one at a time).
    """

    latency: float
    period: float
    total: float
    busy: tuple[float, ...]
    limit: str


def forecast(line: PlannedLine, in_flight: int, requests: int) -> Forecast:
    """Of a line with M requests in flight, N of them waiting."""
    job = line.job
    front, decode = before_decode(line, job), decode_alone(line, job)
    busy = tuple(busy_s(line, stage, job) for stage in range(line.parallel.pp))
    link, rounds = busiest_link_s(line, job), front / min(in_flight, requests)
    endless = max(*busy, link, decode, front / in_flight)
    period = max(*busy, link, decode, rounds)
    limits = {"compute": max(busy), "link": link, "requests": rounds, "decode": decode}
    # After the last of its steps a request is decoded, of which the busiest stage's part is in the period already.
    busiest = busy.index(max(busy))
    drain = decode if rounds == period else max(0.0, decode - decode_busy_s(line, busiest, job))
    return Forecast(
        latency=front + decode,
        period=endless,
        total=max(front + decode, requests * period + drain + other_group_s(line, in_flight, requests, busy)),
        busy=busy,
        limit=max(limits, key=lambda name: limits[name]),
    )


def other_group_s(line: PlannedLine, in_flight: int, requests: int, busy: Sequence[float]) -> float:
    """With split experts: while the first requests are with the first group, or the last with the second, the other
    group has nothing to do; the busier one's work is in the period."""
    if line.parallel.expert_placement == "shared" or requests == 1:
        return 0.0
    seconds = []
    for group in line.parallel.groups:
        share = -(-in_flight * len(group) // line.parallel.pp)
        seconds.append(min(share, requests) * max(busy[stage] for stage in group))
    return min(seconds)


def before_decode(line: PlannedLine, job: Job) -> float:
    """Texts, conditioning and all steps of a request that is alone."""
    stages, branches = range(line.parallel.pp), line.branches(job)
    text = WorkItem(Kind.TEXT, job.id)
    seconds = flow_shop(
        [[line.text_s(stage) for stage in stages]] * branches, [hop_s(line, stage, text, job) for stage in stages]
    )
    seconds += line.encode_s(job)
    seconds += sum(hop_s(line, stage, WorkItem(Kind.ENCODE, job.id), job) for stage in stages)
    if line.parallel.pp > 1:
        seconds += line.transfer_s(Value.EMBEDDING, text, job)
    high = line.spec.high_steps(job)
    return seconds + high * step_s(line, 0, job) + (job.steps - high) * step_s(line, 1, job)


def step_s(line: PlannedLine, expert: int, job: Job) -> float:
    """One step of a request that is alone: its branches one behind the other, and the latents' way back."""
    item, route = WorkItem(Kind.DENOISE, job.id), line.parallel.route(expert)
    hops = [hop_s(line, stage, item, job) if stage > route.start else 0.0 for stage in route]
    seconds = flow_shop([[line.denoise_s(stage, expert, job) for stage in route]] * line.branches(job), hops)
    if line.parallel.cfg == 2 and job.branches == 2:
        seconds += line.transfer_s(Value.PREDICTION, item, job)
    return seconds + (line.transfer_s(Value.LATENTS, item, job) if len(route) > 1 or line.parallel.cfg == 2 else 0.0)


def decode_alone(line: PlannedLine, job: Job) -> float:
    """All chunks, nothing else going on."""
    if not job.chunks:
        return 0.0
    if line.parallel.vae_decode != "layers":
        tail = line.parallel.pp - 1
        return sum(decode_slowest_s(line, tail, chunk, job) for chunk in range(job.chunks))
    stages = range(line.parallel.pp)
    hops = [hop_s(line, stage, WorkItem(Kind.DECODE, job.id, 1), job) for stage in stages]
    seconds = flow_shop([[line.decode_s(stage, chunk, job) for stage in stages] for chunk in range(job.chunks)], hops)
    return seconds + (line.transfer_s(Value.LATENTS, WorkItem(Kind.DENOISE, job.id), job) if len(stages) > 1 else 0.0)


def decode_slowest_s(line: PlannedLine, tail: int, chunk: int, job: Job) -> float:
    """A chunk that one stage decodes, or all together."""
    if line.parallel.decodes_together:
        return max(line.decode_s(stage, chunk, job) for stage in range(line.parallel.pp))
    return line.decode_s(tail, chunk, job)


def flow_shop(items: Sequence[Sequence[float]], hops: Sequence[float]) -> float:
    """When the last of some items leaves the last stage.

    Args:
        items: seconds of each item on each stage. hops: seconds of the way to each stage, one item at a time.
    """
    done, here = [0.0] * len(hops), [0.0] * len(hops)
    for item in items:
        arrives = 0.0
        for stage, seconds in enumerate(item):
            here[stage] = max(here[stage], arrives) + hops[stage]
            done[stage] = max(done[stage], here[stage]) + seconds
            arrives = done[stage]
    return done[-1]


def hop_s(line: PlannedLine, stage: int, item: WorkItem, job: Job) -> float:
    """Of an item's tensors to a stage, from the one before it."""
    return line.link_between([stage - 1, stage]).seconds(line.forward_bytes(stage, item, job)) if stage else 0.0


def busy_s(line: PlannedLine, stage: int, job: Job) -> float:
    """What a request costs a stage, all in all."""
    branches, high = line.branches(job), line.spec.high_steps(job)
    steps = high * line.denoise_s(stage, 0, job) + (job.steps - high) * line.denoise_s(stage, 1, job)
    if line.parallel.expert_placement == "shared":
        steps = job.steps * line.denoise_s(stage, 0, job)
    head = line.encode_s(job) if stage == 0 else 0.0
    return branches * (steps + line.text_s(stage)) + head + decode_busy_s(line, stage, job)


def decode_busy_s(line: PlannedLine, stage: int, job: Job) -> float:
    """What a request's decode costs a stage."""
    if not job.chunks:
        return 0.0
    if line.parallel.vae_decode == "tiled":
        return line.decode_s(stage, job.chunks - 1, job)
    return line.decode_s(stage, 0, job) + (job.chunks - 1) * line.decode_s(stage, 1, job)


def busiest_link_s(line: PlannedLine, job: Job) -> float:
    """What a request costs the slowest of the forward edges."""
    seconds = [0.0]
    forwards = line.branches(job) * job.steps
    for stage in range(1, line.parallel.pp):
        hidden = hop_s(line, stage, WorkItem(Kind.DENOISE, job.id), job) * forwards
        chunks = hop_s(line, stage, WorkItem(Kind.DECODE, job.id, 1), job) * job.chunks
        seconds.append(hidden + (chunks if line.parallel.vae_decode == "layers" else 0.0))
    return max(seconds)
