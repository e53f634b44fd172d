"""`cineline bench line | schedule | traffic | exact`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cineline.cli.options import Json, axes_of, dtype_of, whole_numbers
from cineline.config import DeviceConfig, ParallelConfig
from cineline.errors import InvalidConfig
from cineline.output import check_output
from cineline.scheduler import speed_up_limit
from cineline.spec import WanKind

app = typer.Typer(help="Measure the line on this machine.", no_args_is_help=True)

Runs = Annotated[int, typer.Option(help="Runs of each arm, interleaved.", min=1)]
InFlight = Annotated[str, typer.Option(help="Requests at once, M, such as 1,3.")]
DtypeName = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")]


@app.command()
def line(
    arm: Annotated[
        list[str] | None, typer.Option(help="What is compared, such as pp=2 or pp=2,cfg=2; may be repeated; pp=2.")
    ] = None,
    in_flight: InFlight = "1,3",
    kind: Annotated[str, typer.Option(help="Like which model: ti2v or t2v.")] = "ti2v",
    steps: Annotated[int, typer.Option(help="Solver steps of a request.", min=1)] = 4,
    runs: Runs = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: DtypeName = "float32",
    json: Json = None,
) -> None:
    """Real compute, 8 blocks of width 512 at 1,536 tokens: divided against one rank and diffusers."""
    _check_json(json)
    case_kind = _kind(kind, ("ti2v", "t2v"))
    counts = whole_numbers("in_flight", in_flight)
    from cineline.bench.line import DIFFUSERS, ONE_RANK, LineCase, time_line
    from cineline.bench.measure import Summary, ratios
    from cineline.bench.report import machine, report

    config = DeviceConfig(device, dtype_of("dtype", dtype) or "float32", pin_cores=device == "cpu")
    divided = [axes_of("arm", text) for text in arm or ["pp=2"]]
    case = LineCase(case_kind, divided, counts, steps, runs)
    results = time_line(case, config, _teller())
    rows = []
    for count, arms in results.items():
        limits = {
            str(parallel): f"{float(speed_up_limit(parallel.pp, count, 2)):.2f}"
            for parallel in [ParallelConfig(), *divided]
            if parallel.ranks == parallel.pp
        }
        for name, own in arms.items():
            per_request = Summary.of([run.seconds / count for run in own])
            against = [str(ratios(arms[base], own)) for base in (DIFFUSERS, ONE_RANK)]
            rows.append([str(count), name, str(per_request), *against, limits.get(name, ""), _others(own)])
    report(
        f"{kind}, 8 x 512, 1,536 tokens, {steps} steps, {dtype}, {runs} runs: median (range)",
        ["M", "arm", "s a request", "x diffusers", "x one rank", "limit", "others' CPU"],
        rows,
        {"machine": machine(device), "case": asdict(case), "runs": _plain(results)},
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
    high_steps: Annotated[
        int, typer.Option(help="Steps of a first expert with stages of its own; 0 for one expert.", min=0)
    ] = 0,
    runs: Runs = 4,
    json: Json = None,
) -> None:
    """The real engine with sleeping stages, beside the formula 2MP / max(2M, P+1).

    With split experts (--high-steps) M requests are submitted at once, and as many are in flight as by default.
    """
    _check_json(json)
    counts = whole_numbers("in_flight", in_flight)
    from cineline.bench.measure import Summary
    from cineline.bench.report import machine, report
    from cineline.bench.schedule import ScheduleCase, time_schedule

    if high_steps >= steps or (high_steps and pp < 2):
        raise InvalidConfig(f"high_steps={high_steps} of steps={steps} on pp={pp}: use less, on two stages or more.")
    case = ScheduleCase(pp, counts, stage_ms / 1000, round(hidden_mb * 1e6), steps, branches, runs, high_steps)
    results = time_schedule(case, _teller())
    rows = []
    for count, own in results.items():
        limit = case.limit(count)
        speed_up = Summary.of([case.one_stage_s(count) / run.seconds for run in own])
        share = Summary.of([100 * case.one_stage_s(count) / run.seconds / limit for run in own])
        rows.append([str(pp), str(count), str(speed_up), f"{limit:.2f}", str(share), _others(own)])
    report(
        f"Stages that sleep {stage_ms:g} ms, {hidden_mb:g} MB, {steps} steps, fill included, {runs} runs",
        ["P", "M", "speed-up", "limit", "% of the limit", "others' CPU"],
        rows,
        {"machine": machine("cpu"), "case": asdict(case), "runs": _plain(results)},
        json,
    )


@app.command()
def traffic(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json: Json = None,
) -> None:
    """Bytes that a rank sends for a forward, by axis: counted, beside the formula."""
    _check_json(json)
    config = DeviceConfig(device)
    from cineline.bench.report import machine, report
    from cineline.bench.traffic import measure

    found = measure(config, _teller())
    report(
        "The busiest rank, one forward, 4 blocks of width 96, 128 tokens, float32",
        ["axes", "counted", "computed", "formula"],
        [[row.parallel, f"{row.counted:,}", f"{row.computed:,}", row.formula] for row in found],
        {"machine": machine(device), "rows": [asdict(row) for row in found]},
        json,
    )


@app.command()
def exact(
    model: Annotated[
        str | None,
        typer.Option(help="Folder, hub id or mini; a random checkpoint of each kind.", show_default=False),
    ] = None,
    pp: Annotated[str, typer.Option(help="Stages, such as 1,2.")] = "1,2",
    in_flight: InFlight = "1,3",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: DtypeName = "float32",
    json: Json = None,
) -> None:
    """What is equal to diffusers bit for bit on this device; exit code 1 where anything is not."""
    _check_json(json)
    stages, counts = whole_numbers("pp", pp), whole_numbers("in_flight", in_flight)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the number of threads changes bits on the CPU
    config = DeviceConfig(device, dtype_of("dtype", dtype) or "float32")
    from cineline.bench.exact import compare
    from cineline.bench.report import machine, report
    from cineline.hub import open_model
    from cineline.models.random_checkpoint import RandomConfig, save_random_checkpoint
    from cineline.spec import WanSpec

    tell = _teller()
    with tempfile.TemporaryDirectory() as temporary:
        if model is not None:
            spec = open_model(model)
            assert isinstance(spec, WanSpec)
            folders = [spec.folder]
        else:
            kinds: tuple[WanKind, ...] = ("ti2v", "t2v", "i2v")
            folders = [save_random_checkpoint(Path(temporary) / kind, RandomConfig(kind)) for kind in kinds]
        found = [row for folder in folders for row in compare(folder, config, stages, counts, tell)]
    report(
        f"Against diffusers on {device}, {dtype}: how many mixed requests are equal",
        ["model", "stages", "in flight", "latents", "frames", "largest difference"],
        [
            [
                *(row.kind, str(row.stages), str(row.in_flight)),
                *(f"{equal} of {row.requests}" for equal in (row.latents, row.frames)),
                f"{row.deviation:.1e}",
            ]
            for row in found
        ],
        {"machine": machine(device), "rows": [asdict(row) for row in found]},
        json,
    )
    if not all(row.exact for row in found):
        raise typer.Exit(1)


def _plain(results: Any) -> Any:
    """Runs as JSON has them."""
    if isinstance(results, dict):
        return {str(name): _plain(value) for name, value in results.items()}
    return [asdict(run) for run in results]


def _others(runs: Any) -> str:
    """The largest share of CPU that others used during a run that counts, and how many runs were repeated."""
    repeats = sum(run.repeats for run in runs)
    return f"{max(run.others for run in runs):.1%}" + (f", {repeats} repeated" if repeats else "")


def _kind(name: str, known: tuple[WanKind, ...]) -> WanKind:
    for kind in known:
        if name == kind:
            return kind
    raise InvalidConfig(f"kind={name!r} is not timed: use {' or '.join(known)}.")


def _check_json(path: Path | None) -> None:
    if path is not None:
        check_output(path, (".json",))


def _teller() -> Callable[[str], None]:
    console = Console(stderr=True)
    return lambda text: console.print(text, highlight=False)
