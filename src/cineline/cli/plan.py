"""`cineline plan`."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cineline.cli.options import Fields, Given, Json, one_of, spread
from cineline.core.config import ModelFiles
from cineline.core.extras import need
from cineline.core.family import plannable
from cineline.core.lora import LoraMode
from cineline.core.output import check_output, whole_file
from cineline.core.request import VideoRequest
from cineline.core.streams import console
from cineline.core.trace import write_trace
from cineline.engine.hub import open_model
from cineline.engine.lora import add_loras
from cineline.errors import InvalidConfig
from cineline.families.registry import known_model
from cineline.planning.hardware import devices_of, link_of
from cineline.planning.plan import Plan
from cineline.planning.planner import Planning, Task, planned_job
from cineline.planning.planner import plan as compare
from cineline.planning.report import LIMITS, as_json, chosen_plans, exactness, name_of, options_of, stage_rows, verdict
from cineline.schedule.simulator import simulate
from cineline.schedule.timeline import PICTURE_SUFFIXES, draw_timeline

FILE_WIDTH = 150
"""Columns of what is printed where there is no terminal."""

_FIELDS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "preset", "cache")
_UNSET = {name: "" if name in ("preset", "cache") else "the model's default" for name in _FIELDS}


@spread
def plan(
    *,
    devices: Annotated[str, typer.Option(help="Such as 4xL40S, or 2xL40S,1xRTX4090 in the order of the stages.")],
    model: Annotated[
        str | None,
        typer.Option(help="A hub id of docs/models.md (no download), or a folder.", show_default=False),
    ] = None,
    files: Annotated[Given, Fields(ModelFiles)],
    lora: Annotated[
        list[str] | None,
        typer.Option(help="A LoRA as for generate; one that is merged takes nothing.", show_default=False),
    ] = None,
    lora_mode: Annotated[str, typer.Option(help="merge or runtime.")] = "merge",
    link: Annotated[str, typer.Option(help="pcie4, pcie5, nvlink3 to 5, ethernet10, 25, 100 or 400.")] = "pcie4",
    fields: Annotated[Given, Fields(VideoRequest, _FIELDS, unset=_UNSET)],
    requests: Annotated[int, typer.Option(help="How many such requests wait at once.", min=1)] = Task.requests,
    settings: Annotated[Given, Fields(Task)],
    json: Json = None,
    timeline: Annotated[
        Path | None,
        typer.Option(help="Simulate the best plan: a timeline for ui.perfetto.dev, .json.", show_default=False),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="The same as a picture, .png or .svg.", show_default=False)
    ] = None,
) -> None:
    """How to divide a model over devices: seconds and GB, computed before anything runs.

    From the model's configs and the devices' data sheets, at stated shares of
    their peak rates; no weights, no accelerator and no download are needed.
    """
    for file, suffixes in ((timeline, (".json",)), (picture, PICTURE_SUFFIXES)):
        if file is not None:
            check_output(file, suffixes)
    if picture is not None:
        need("matplotlib")
    if model is None and not files:
        raise InvalidConfig("There is no model: give --model, or its files with --transformer and the like.")
    known = None if model is None else known_model(model)
    opened = open_model(known or model, files=ModelFiles(**files))
    spec = plannable(add_loras(opened, lora or [], one_of("lora_mode", lora_mode, LoraMode)))
    task = Task(spec, devices_of(devices), link_of(link), planned_job(spec, fields), requests, **settings)
    planning = compare(task)
    show(planning, task)
    if json is not None:
        with whole_file(json) as temporary:
            temporary.write_text(json_format.dumps(as_json(planning, task), indent=1) + "\n")
    if timeline is not None or picture is not None:
        _replay(planning.best, task, timeline, picture)


def _replay(best: Plan, task: Task, timeline: Path | None, picture: Path | None) -> None:
    """Simulate one replica's share of the requests, and write what was asked for."""
    jobs = [dataclasses.replace(task.job, id=number) for number in range(-(-task.requests // best.replicas))]
    simulate(best.line, jobs, best.in_flight, rendezvous=True)  # raises where sends that wait would lock the line
    run = simulate(best.line, jobs, best.in_flight)
    bubbles = max(run.bubbles.values())
    print(
        f"Simulated: {run.makespan_s:.1f} s for {len(jobs)} requests, bubbles of at most {bubbles:.1%} on a stage, no "
        "deadlock even where each send waits for its receive."
    )
    if timeline is not None:
        write_trace(run.slices, timeline)
    if picture is not None:
        draw_timeline(run.slices, picture)


def show(planning: Planning, task: Task) -> None:
    """Print the plan and the alternatives."""
    screen = console(width=FILE_WIDTH)
    job, best = task.job, planning.best
    names = [device.name for device in task.devices]
    listed = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    skipped = f" of which {len(job.skipped)} are skipped (lossy)," if job.skipped else ""
    screen.print(
        f"{task.spec.folder}, {job.width}x{job.height}, {job.num_frames} frames, {job.steps} steps,{skipped} "
        f"{task.requests} requests, on {listed} over {task.link.name}. Computed, not measured.",
        highlight=False,
        soft_wrap=True,
    )
    screen.print(_plans_table(planning, task))
    screen.print(_stages_table(best))
    for sentence in (
        verdict(planning, task),
        f"Limited by {LIMITS[best.limit]}.",
        *([f"Start {best.replicas} of it, each with its own devices and requests."] if best.replicas > 1 else []),
        f"Run it: {options_of(best, task)}",
    ):
        screen.print(sentence, highlight=False, soft_wrap=True)


def _plans_table(planning: Planning, task: Task) -> Table:
    table = Table(title="Plans", title_justify="left")
    for number, column in enumerate(
        ["", "axes", "result", "in flight", "s alone", "s a request", f"s for {task.requests}", "GB"]
    ):
        table.add_column(column, justify="right" if number > 2 else "left")
    for plan, names in chosen_plans(planning).items():
        table.add_row(", ".join(names), *_cells(plan))
    return table


def _cells(plan: Plan) -> list[str]:
    return [
        name_of(plan) + ("" if plan.parallel.vae_decode in ("layers",) else f", decode {plan.parallel.vae_decode}"),
        exactness(plan),
        str(plan.in_flight),
        f"{plan.latency:.1f}",
        f"{plan.period:.1f}",
        f"{plan.total:.1f}",
        f"{plan.peak / 1e9:.1f}",
    ]


def _stages_table(plan: Plan) -> Table:
    table = Table(title=f"The best plan's stages (vae_decode={plan.parallel.vae_decode})", title_justify="left")
    rows = stage_rows(plan)
    for column in ["stage", "device", "blocks", "text layers", "decoder units", "GB weights", "GB at most", "busy"]:
        table.add_column(column, justify="left" if column == "device" else "right")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("stage", "device", "blocks", "text_layers", "decoder_units")),
            *(f"{row[name]:.1f}" for name in ("weights_gb", "peak_gb")),
            f"{row['busy']:.0%}",
        )
    return table
