"""A plan in words: sentences, options of `cineline generate`, JSON (no torch)."""

from __future__ import annotations

from typing import Any

from cineline.core.config import AXES, LEAST, ParallelConfig, Place, texts_of
from cineline.planning.plan import Plan
from cineline.planning.planner import Planning, Task

LIMITS = {
    "compute": "compute: the busiest stage always has work",
    "link": "the link between the stages",
    "decode": "decoding, one request at a time",
    "requests": "too few requests: stages wait for the latents' way back",
    "memory": "memory: fewer requests fit than would fill the stages",
}


CHOSEN = ("best", "latency", "throughput", "memory", "replicas")
"""Names of plans that are chosen for something."""


def chosen_plans(planning: Planning) -> dict[Plan, list[str]]:
    """Each plan once, with the names of what it is chosen for; others have none."""
    found: dict[Plan, list[str]] = {}
    for name in CHOSEN:
        if (plan := getattr(planning, name)) is not None:
            found.setdefault(plan, []).append(name)
    return found | {plan: [] for plan in planning.others if plan not in found}


def options_of(plan: Plan, task: Task) -> str:
    """What makes `cineline generate` run this plan."""
    axes, job = plan.parallel, task.job
    words = ['"PROMPT"', *(["--image FILE"] if job.has_image else []), task.spec.model_options]
    words += [f"--height {job.height} --width {job.width} --num-frames {job.num_frames}"]
    words += [f"--num-inference-steps {job.steps} --guidance-scale {job.guidance_scale:g}"]
    words += [f"--{name.replace('_', '-')} {value}".rstrip() for name, value in job.own_settings.items()]
    for name in texts_of(ParallelConfig):
        value = getattr(axes, name)
        if value != getattr(ParallelConfig, name) and (name in AXES or axes.pp > 1):  # one stage has nothing to split
            words.append(f"--{name.replace('_', '-')} {','.join(map(str, value)) if name in LEAST else value}")
    words.append(f"--in-flight {plan.in_flight} --dtype {task.dtype} --vae-dtype {task.vae_dtype}")
    return "cineline generate " + " ".join(words)


def name_of(plan: Plan) -> str:
    """Its axes, with the number of replicas."""
    axes = str(plan.parallel)
    return axes if plan.replicas == 1 else f"{plan.replicas} replicas" + ("" if axes == "pp=1" else f" of {axes}")


def verdict(planning: Planning, task: Task) -> str:
    """Whether stages are the answer, and what else would be."""
    best, waiting = planning.best, f"{task.requests} request{'s' if task.requests > 1 else ''}"
    if len(task.devices) == 1:
        return "One device: nothing to divide."
    if best.parallel.pp > 1:
        if len(set(task.devices)) > 1:
            return "Stages: whole models side by side are not compared on unequal devices."
        if planning.replicas is None:
            return f"Stages: one {task.devices[0].name} does not hold the whole model."
        return (
            f"Stages: {best.total:.0f} s for {waiting} against {planning.replicas.total:.0f} s with a whole model on "
            "each device."
        )
    if best.replicas > 1:
        return f"The pipeline is not the best answer here: {name_of(best)}, without any link, are faster for {waiting}."
    return f"The pipeline is not the best answer here: {name_of(best)} is faster for {waiting}."


def exactness(plan: Plan) -> str:
    """What its results are, against one device's."""
    if plan.exact:
        return "exact"
    if plan.parallel.vae_decode == "rows":
        return "close (decoding by rows: float32 frames differ by a grey level in places)"
    return "close (sums in another order)"


def stage_rows(plan: Plan) -> list[dict[str, Any]]:
    """Each stage's share and what it holds, in GB of 10^9 bytes."""
    line, costs, axes = plan.line, plan.line.costs, plan.parallel
    rows = []
    for stage, cut in enumerate(axes.cut(costs.blocks, costs.text_layers, len(costs.decoder_bytes))):
        rows.append(
            {
                "stage": stage,
                "device": line.devices[stage].name,
                "blocks": len(cut.blocks),
                "text_layers": len(cut.text),
                "decoder_units": len(cut.decoder),
                "weights_gb": costs.held_bytes(axes, Place(pp=stage)) / 1e9,
                "peak_gb": plan.peaks[stage] / 1e9,
                "busy": plan.busy[stage],
            }
        )
    return rows


def as_json(planning: Planning, task: Task) -> dict[str, Any]:
    """Everything, for programs."""
    chosen = {name: getattr(planning, name) for name in CHOSEN}
    return {
        "model": str(task.spec.folder),
        "devices": [device.name for device in task.devices],
        "link": task.link.name,
        "requests": task.requests,
        "request": {name: getattr(task.job, name) for name in ("height", "width", "num_frames", "steps", "branches")},
        "verdict": verdict(planning, task),
        **{name: None if plan is None else plan_json(plan, task) for name, plan in chosen.items()},
        "others": [plan_json(plan, task) for plan in planning.others],
    }


def plan_json(plan: Plan, task: Task) -> dict[str, Any]:
    """One plan."""
    return {
        "axes": name_of(plan),
        "replicas": plan.replicas,
        "exact": plan.exact,
        "in_flight": plan.in_flight,
        "latency_s": plan.latency,
        "seconds_a_request": plan.period,
        "total_s": plan.total,
        "peak_gb": plan.peak / 1e9,
        "limit": plan.limit,
        "stages": stage_rows(plan),
        "command": options_of(plan, task),
    }
