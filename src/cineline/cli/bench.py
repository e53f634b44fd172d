"""`cineline bench line | videos | decode | schedule | simulator | memory | plan | traffic | exact`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from cineline.cli.options import Json, axes_of, one_of, whole_numbers
from cineline.core.config import DeviceConfig, Dtype, ParallelConfig
from cineline.core.output import check_output
from cineline.errors import InvalidConfig
from cineline.families.wan.spec import WanKind
from cineline.schedule.scheduler import speed_up_limit

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
    case_kind: WanKind = one_of("kind", kind, Literal["ti2v", "t2v"])
    counts = whole_numbers("in_flight", in_flight)
    from cineline.bench.line import DIFFUSERS, ONE_RANK, LineCase, time_line
    from cineline.bench.measure import Summary, ratios
    from cineline.bench.report import machine, report

    config = DeviceConfig(device, one_of("dtype", dtype, Dtype), pin_cores=device == "cpu")
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
def videos(
    pp: Annotated[str, typer.Option(help="Stages of each arm, such as 1,2; the first is compared with.")] = "1,2",
    requests: Annotated[int, typer.Option(help="Videos at once.", min=1)] = 8,
    kind: Annotated[str, typer.Option(help="Like which model: ti2v or t2v.")] = "t2v",
    steps: Annotated[int, typer.Option(help="Solver steps of a request.", min=1)] = 10,
    runs: Runs = 4,
    dtype: DtypeName = "float32",
    json: Json = None,
) -> None:
    """From prompts to MP4 files on the CPU: each arm on as many cores as it has ranks, the writer included."""
    _check_json(json)
    case_kind: WanKind = one_of("kind", kind, Literal["ti2v", "t2v"])
    stages = whole_numbers("pp", pp)
    from cineline.bench.measure import Summary, ratios
    from cineline.bench.report import machine, report
    from cineline.bench.videos import VideosCase, time_videos

    config = DeviceConfig("cpu", one_of("dtype", dtype, Dtype), pin_cores=True)
    case = VideosCase(case_kind, stages, requests, steps, runs)
    results = time_videos(case, config, _teller())
    report(
        f"{requests} videos of a {kind} model, 384 tokens, {steps} steps, {dtype}, {runs} runs: median (range)",
        ["arm", "seconds", f"x pp={stages[0]}", "others' CPU"],
        [
            [
                f"pp={count}",
                str(Summary.of([run.seconds for run in own])),
                str(ratios(results[stages[0]], own)),
                _others(own),
            ]
            for count, own in results.items()
        ],
        {"machine": machine("cpu"), "case": asdict(case), "runs": _plain(results)},
        json,
    )


@app.command()
def decode(
    kind: Annotated[str, typer.Option(help="Whose VAE: t2v (Wan 2.1's) or ti2v (Wan 2.2's).")] = "t2v",
    pp: Annotated[int, typer.Option(help="Ranks that share the decoder.", min=2)] = 2,
    frames: Annotated[int, typer.Option(help="Latent frames.", min=1)] = 21,
    size: Annotated[int, typer.Option(help="Pixels a side.", min=16)] = 128,
    width: Annotated[int, typer.Option(help="Channels of the decoder's last block, really 96 and 256.", min=1)] = 32,
    runs: Runs = 4,
    dtype: DtypeName = "float32",
    json: Json = None,
) -> None:
    """Decoding alone, all the real layers with fewer channels: by layers and by rows against one rank.

    A large picture shows the memory: --width 16 --frames 2 --runs 1, with --size 1024 for t2v, 2048 for ti2v.
    """
    _check_json(json)
    case_kind: WanKind = one_of("kind", kind, Literal["t2v", "ti2v"])
    if size % 16:
        raise InvalidConfig(f"size={size} is no multiple of 16: use {size // 16 * 16} or {size // 16 * 16 + 16}.")
    from cineline.bench.decode import DecodeCase, time_decode
    from cineline.bench.measure import Summary, ratios
    from cineline.bench.report import machine, report

    config = DeviceConfig(vae_dtype=one_of("dtype", dtype, Dtype), pin_cores=True)
    case = DecodeCase(case_kind, pp, frames, size, width, runs)
    found = time_decode(case, config, _teller())
    whole = next(iter(found.values()))
    rows = []
    for way, own in found.items():
        rows.append(
            [
                *(way, str(Summary.of([run.seconds for run in own.runs])), str(ratios(whole.runs, own.runs))),
                *(f"{own.peak_bytes / 1e6:,.0f}", f"{own.peak_bytes / whole.peak_bytes:.2f}"),
                *(f"{own.equal:.4%}", str(own.difference), _others(own.runs)),
            ]
        )
    report(
        f"VAE of {kind}, {size} x {size}, {frames} latent frames, width {width}, pp={pp}, {dtype}, {runs} runs",
        ["way", "s", "x one rank", "peak MB a rank", "share", "equal", "largest difference", "others' CPU"],
        rows,
        {"machine": machine("cpu"), "case": asdict(case), "ways": {way: asdict(own) for way, own in found.items()}},
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
def simulator(
    arm: Annotated[
        list[str] | None, typer.Option(help="What is simulated, such as pp=4,cfg=2; may be repeated; pp=2, 4 and 8.")
    ] = None,
    in_flight: InFlight = "1,2,3,4,5",
    stage_ms: Annotated[float, typer.Option(help="Sleep of a stage, for one forward.", min=0.1)] = 50.0,
    hidden_mb: Annotated[float, typer.Option(help="Hidden states that travel, in 10^6 bytes.", min=0.001)] = 3.0,
    runs: Runs = 2,
    json: Json = None,
) -> None:
    """The simulator beside the traced engine, on sleeping stages and unequal requests."""
    _check_json(json)
    counts = whole_numbers("in_flight", in_flight)
    arms = [axes_of("arm", text) for text in arm or ["pp=2", "pp=4", "pp=8"]]
    from cineline.bench.report import machine, report
    from cineline.bench.simulator import SimulatorCase, compare

    case = SimulatorCase(arms, counts, stage_ms / 1000, round(hidden_mb * 1e6), runs)
    constants, found = compare(case, _teller())
    beside = ", ".join(f"{name.removesuffix('_s')} {1000 * value:.2f}" for name, value in asdict(constants).items())
    report(
        f"Stages that sleep {stage_ms:g} ms; beside it, measured first, in ms: {beside}",
        ["arm", "M", "simulated s", "measured s", "error", "others' CPU"],
        [
            [
                *(one.parallel, str(one.in_flight), f"{one.simulated_s:.2f}", str(one.measured)),
                *(f"{one.error:+.1%}", _others(one.runs)),
            ]
            for one in found
        ],
        {
            "machine": machine("cpu"),
            "case": asdict(case),
            "constants": asdict(constants),
            "rows": [asdict(one) | {"error": one.error} for one in found],
        },
        json,
    )


@app.command()
def memory(
    kind: Annotated[str, typer.Option(help="Like which model: ti2v or t2v.")] = "t2v",
    pp: Annotated[str, typer.Option(help="Stages, such as 2,4, beside one.")] = "2,4",
    json: Json = None,
) -> None:
    """Weights by rank, where text encoder and VAE are as heavy as the transformers: read, and resident."""
    _check_json(json)
    case_kind: WanKind = one_of("kind", kind, Literal["ti2v", "t2v"])
    stages = whole_numbers("pp", pp)
    from cineline.bench.memory import measure
    from cineline.bench.report import machine, report

    found = list(measure(case_kind, stages, _teller()))
    report(
        f"A {kind} model of three equal thirds, float32",
        ["P", "MB read by rank", "MB resident by rank", "fullest, of an even share"],
        [
            [
                str(row.stages),
                *(", ".join(f"{size / 1e6:.0f}" for size in sizes) for sizes in (row.read, row.resident)),
                f"{row.share:.2f}",
            ]
            for row in found
        ],
        {"machine": machine("cpu"), "rows": [asdict(row) for row in found]},
        json,
    )


@app.command()
def plan(
    kind: Annotated[str, typer.Option(help="Like which model: ti2v or t2v.")] = "ti2v",
    pp: Annotated[str, typer.Option(help="Stages, such as 1,2.")] = "1,2",
    requests: Annotated[int, typer.Option(help="Videos at once.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Solver steps of a request.", min=1)] = 4,
    runs: Runs = 4,
    json: Json = None,
) -> None:
    """The planner beside the engine on this CPU, one core a rank: seconds, weights, peak memory."""
    _check_json(json)
    case_kind: WanKind = one_of("kind", kind, Literal["ti2v", "t2v"])
    from cineline.bench.measure import Summary
    from cineline.bench.prediction import PredictionCase, compare
    from cineline.bench.report import machine, report

    case = PredictionCase(case_kind, whole_numbers("pp", pp), requests, steps, runs)
    found = list(compare(case, _teller()))
    rows = []
    for row in found:
        seconds = Summary.of([run.seconds for run in row.runs])
        rows.append(
            [str(row.stages), f"{row.predicted_s:.1f}", str(seconds), f"{row.predicted_s / seconds.median - 1:+.1%}"]
        )
        rows[-1].append("equal" if list(row.weights) == list(row.read) else "DIFFERENT")
        planned, in_use, resident = (
            ", ".join(f"{size / 1e6:.0f}" for size in sizes) for sizes in (row.peaks, row.in_use, row.resident)
        )
        errors = (computed / used - 1 for computed, used in zip(row.peaks, row.in_use, strict=True))
        rows[-1] += [planned, in_use, ", ".join(f"{error:+.1%}" for error in errors), resident, _others(row.runs)]
    report(
        f"{requests} videos of a {kind} model, 1,536 tokens, {steps} steps, decoded, float32, {runs} runs",
        ["P", "planned s", "measured s", "error", "weights", "plan MB", "in use", "error", "kept", "others' CPU"],
        rows,
        {"machine": machine("cpu"), "case": asdict(case), "rows": [asdict(row) for row in found]},
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
    config = DeviceConfig(device, one_of("dtype", dtype, Dtype))
    from cineline.bench.exact import compare
    from cineline.bench.report import machine, report
    from cineline.engine.hub import open_model
    from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
    from cineline.families.wan.spec import WanSpec

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


def _check_json(path: Path | None) -> None:
    if path is not None:
        check_output(path, (".json",))


def _teller() -> Callable[[str], None]:
    console = Console(stderr=True)
    return lambda text: console.print(text, highlight=False)
