"""`cineline bench line | schedule | recovery | serve | exact`."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from cineline.cli.options import Fields, Given, InFlight, Json, Runs, axes_of, one_of, spread, teller, whole_numbers
from cineline.core.config import DeviceConfig, ModelFiles
from cineline.core.extras import need
from cineline.core.request import VideoRequest
from cineline.engine.hub import MINIS
from cineline.errors import InvalidConfig, shown
from cineline.families.wan.shapes import WanKind

app = typer.Typer(help="Measure the line on this machine.", no_args_is_help=True)

Devices = Annotated[Given, Fields(DeviceConfig, ["device", "dtype"])]


@app.command()
@spread
def line(
    *,
    arm: Annotated[
        list[str] | None, typer.Option(help="What is compared, such as pp=2 or pp=2,cfg=2; may be repeated; pp=2.")
    ] = None,
    in_flight: InFlight = "1,3",
    kind: Annotated[str, typer.Option(help="Like which model: ti2v or t2v.")] = "ti2v",
    steps: Annotated[int, typer.Option(help="Solver steps of a request.", min=1)] = 4,
    fields: Annotated[Given, Fields(VideoRequest, ["cache"])],
    runs: Runs = 4,
    devices: Devices,
    json: Json = None,
) -> None:
    """Real compute, 8 blocks of width 512 at 1,536 tokens: divided against one rank and diffusers."""
    case_kind: WanKind = one_of("kind", kind, Literal["ti2v", "t2v"])
    counts = whole_numbers("in_flight", in_flight)
    need("accelerate")
    from cineline.bench.line import COLUMNS, LineCase, rows, time_line
    from cineline.bench.measure import plain
    from cineline.bench.report import machine, report

    config = DeviceConfig(**devices, pin_cores=devices["device"] == "cpu")
    case = LineCase(case_kind, [axes_of("arm", text) for text in arm or ["pp=2"]], counts, steps, runs, **fields)
    results = time_line(case, config, teller())
    report(
        f"{kind}, 8 x 512, 1,536 tokens, {case.steps_in_words}, {config.dtype}, {runs} runs: median (range)",
        COLUMNS,
        rows(case, results),
        {"machine": machine(config.device), "case": asdict(case), "runs": plain(results)},
        json,
    )


@app.command()
def schedule(
    pp: Annotated[int, typer.Option(help="Stages, P; they sleep, so any number works.", min=1)] = 4,
    in_flight: InFlight = "1,3",
    stage_ms: Annotated[float, typer.Option(help="Sleep of a stage, for one forward.", min=0.1)] = 50.0,
    hidden_mb: Annotated[float, typer.Option(help="Hidden states that travel, in 10^6 bytes.", min=0.001)] = 3.0,
    steps: Annotated[int, typer.Option(help="Solver steps of a request.", min=1)] = 40,
    branches: Annotated[int, typer.Option(help="Forwards a step: 2 with guidance, 1 without.", min=1, max=2)] = 2,
    waves: Annotated[
        int, typer.Option(help="Times M requests submitted at once, of which M are in flight.", min=1)
    ] = 1,
    high_steps: Annotated[
        int, typer.Option(help="Steps of a first expert with stages of its own; 0 for one expert.", min=0)
    ] = 0,
    skip_share: Annotated[
        float, typer.Option(help="Of the steps, those that a cache skips; one stage skips none.", min=0, max=0.8)
    ] = 0.0,
    runs: Runs = 4,
    json: Json = None,
) -> None:
    """The real engine with sleeping stages, beside the formula 2MP / max(2M, P+1).

    Without guidance that is MP / max(M, P). Models of 4 steps: --steps 4
    --branches 1 --in-flight 5 --waves 10 (one wave of so few steps is hardly
    more than the line's fill).

    With split experts (--high-steps) M requests are submitted at once, and as many are in flight as by default.
    """
    counts = whole_numbers("in_flight", in_flight)
    if high_steps >= steps or (high_steps and pp < 2):
        raise InvalidConfig(
            f"high_steps={shown(high_steps)} of steps={shown(steps)} on pp={shown(pp)}: use less, on two stages or "
            "more."
        )
    from cineline.bench.measure import plain
    from cineline.bench.report import machine, report
    from cineline.bench.schedule import COLUMNS, ScheduleCase, rows, time_schedule

    sizes = stage_ms / 1000, round(hidden_mb * 1e6), steps, branches, runs
    case = ScheduleCase(pp, counts, *sizes, high_steps, waves, skip_share)
    timed = time_schedule(case, teller())
    report(
        f"Stages that sleep {stage_ms:g} ms, {hidden_mb:g} MB, {steps} steps, fill included, {runs} runs",
        COLUMNS,
        rows(case, timed),
        {"machine": machine("cpu"), "case": asdict(case), "one_stage": plain(timed.base), "runs": plain(timed.arms)},
        json,
    )


@app.command()
@spread
def recovery(
    *,
    arm: Annotated[str, typer.Option(help="How the model is divided, such as pp=2 or pp=2,cfg=2.")] = "pp=2",
    in_flight: Annotated[int, typer.Option(help="Requests at once.", min=1)] = 3,
    snapshot_every: Annotated[int, typer.Option(help="Solver steps from one snapshot to the next.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Solver steps of a request.", min=1)] = 8,
    runs: Runs = 8,
    devices: Devices,
    json: Json = None,
) -> None:
    """What snapshots cost: 8 blocks of width 512 at 1,536 tokens, without them, with them, and on disk."""
    from cineline.bench.measure import beside_first, plain
    from cineline.bench.recovery import COLUMNS, RecoveryCase, time_recovery
    from cineline.bench.report import machine, report

    config = DeviceConfig(**devices, pin_cores=devices["device"] == "cpu")
    case = RecoveryCase(axes_of("arm", arm), in_flight, snapshot_every, steps, runs)
    results = time_recovery(case, config, teller())
    report(
        f"A snapshot every {snapshot_every} steps, {arm}, M={in_flight}, {config.dtype}, {runs} runs: median (range)",
        COLUMNS,
        beside_first(results, in_flight),
        {"machine": machine(config.device), "case": asdict(case), "runs": plain(results)},
        json,
    )


@app.command()
@spread
def serve(
    *,
    model: Annotated[str, typer.Option(help="Folder, hub id or mini.")] = MINIS[0],
    pp: Annotated[int, typer.Option(help="Stages.", min=1)] = 2,
    clients: Annotated[int, typer.Option(help="At once, each with one request.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Solver steps of a request.", min=1)] = 25,
    runs: Runs = 4,
    asks: Annotated[int, typer.Option(help="Times that get and list are timed in a run, at most.", min=1)] = 2000,
    devices: Devices,
    json: Json = None,
) -> None:
    """The service with many clients, against the same requests as a batch; and how soon it answers meanwhile."""
    need("fastapi")
    from cineline.bench.measure import plain
    from cineline.bench.report import machine, report
    from cineline.bench.serve import COLUMNS, ServeCase, rows, time_serve

    config = DeviceConfig(**devices)
    case = ServeCase(model, pp, clients, steps, runs, asks)
    results, asked = time_serve(case, config, teller())
    report(
        f"{model}, pp={pp}, {clients} requests of {steps} steps, {config.dtype}, {runs} runs: median (range)",
        COLUMNS,
        rows(case, results, asked),
        {"machine": machine(config.device), "case": asdict(case), "runs": plain(results), "answers_s": asked.seconds},
        json,
    )


@app.command()
@spread
def exact(
    *,
    model: Annotated[
        str | None,
        typer.Option(help="Folder, hub id or mini; a random checkpoint of each kind.", show_default=False),
    ] = None,
    files: Annotated[Given, Fields(ModelFiles)],
    arm: Annotated[
        list[str] | None,
        typer.Option(help="How it is divided, such as pp=2 or pp=2,cfg=2; may be repeated; pp=1, pp=2."),
    ] = None,
    in_flight: InFlight = "1,3",
    devices: Devices,
    json: Json = None,
) -> None:
    """What is equal to diffusers bit for bit on this device; exit code 1 where anything is not."""
    arms = [axes_of("arm", text) for text in arm or ["pp=1", "pp=2"]]
    counts = whole_numbers("in_flight", in_flight)
    need("accelerate")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the number of threads changes bits on the CPU
    config = DeviceConfig(**devices)
    from cineline.bench.exact import COLUMNS, compare, models, rows
    from cineline.bench.report import machine, report

    tell = teller()
    with tempfile.TemporaryDirectory() as temporary:
        given = models(model, ModelFiles(**files), config.dtype, Path(temporary))
        found = [row for one in given for row in compare(one, config, arms, counts, tell)]
    report(
        f"Against diffusers on {config.device}, {config.dtype}: how many mixed requests are equal",
        COLUMNS,
        rows(found),
        {"machine": machine(config.device), "rows": [asdict(row) for row in found]},
        json,
    )
    if not all(row.exact for row in found):
        raise typer.Exit(1)
