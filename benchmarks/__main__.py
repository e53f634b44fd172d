"""`python -m benchmarks COMMAND`, from the root: see --help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cineline.bench.measure import beside_first, plain
from cineline.bench.report import machine, report
from cineline.bench.schedule import ScheduleCase
from cineline.cli import run
from cineline.cli.options import InFlight, Json, Runs, axes_of, one_of, teller, whole_numbers
from cineline.core.config import DeviceConfig, Dtype
from cineline.errors import InvalidConfig
from cineline.families.wan.shapes import WanKind

app = typer.Typer(help="Measure Cineline's own parts.", no_args_is_help=True, add_completion=False)

Kind = Annotated[str, typer.Option(help="Like which model: ti2v or t2v.")]
Stages = Annotated[str, typer.Option(help="Stages, such as 1,2.")]
DtypeName = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")]
Steps = Annotated[int, typer.Option(help="Solver steps of a request.", min=1)]


@app.command()
def videos(
    pp: Annotated[str, typer.Option(help="Stages of each arm, such as 1,2; the first is compared with.")] = "1,2",
    requests: Annotated[int, typer.Option(help="Videos at once.", min=1)] = 8,
    kind: Kind = "t2v",
    steps: Steps = 10,
    runs: Runs = 4,
    dtype: DtypeName = "float32",
    json: Json = None,
) -> None:
    """From prompts to MP4 files on the CPU: each arm on as many cores as it has ranks, the writer included."""
    from benchmarks.videos import VideosCase, rows, time_videos

    config = DeviceConfig("cpu", one_of("dtype", dtype, Dtype), pin_cores=True)
    case = VideosCase(_kind(kind), whole_numbers("pp", pp), requests, steps, runs)
    results = time_videos(case, config, teller())
    _report(
        f"{requests} videos of a {kind} model, 384 tokens, {steps} steps, {dtype}, {runs} runs: median (range)",
        ["arm", "seconds", f"x pp={case.stages[0]}", "others' CPU"],
        rows(case, results),
        {"case": asdict(case), "runs": plain(results)},
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
    if size % 16:
        raise InvalidConfig(f"size={size} is no multiple of 16: use {size // 16 * 16} or {size // 16 * 16 + 16}.")
    from benchmarks.decode import COLUMNS, DecodeCase, rows, time_decode

    config = DeviceConfig(vae_dtype=one_of("dtype", dtype, Dtype), pin_cores=True)
    case = DecodeCase(_kind(kind), pp, frames, size, width, runs)
    found = time_decode(case, config, teller())
    _report(
        f"VAE of {kind}, {size} x {size}, {frames} latent frames, width {width}, pp={pp}, {dtype}, {runs} runs",
        COLUMNS,
        rows(found),
        {"case": asdict(case), "ways": {way: asdict(own) for way, own in found.items()}},
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
    counts = whole_numbers("in_flight", in_flight)
    arms = [axes_of("arm", text) for text in arm or ["pp=2", "pp=4", "pp=8"]]
    from benchmarks.simulator import COLUMNS, SimulatorCase, compare, rows

    case = SimulatorCase(arms, counts, stage_ms / 1000, round(hidden_mb * 1e6), runs)
    constants, found = compare(case, teller())
    beside = ", ".join(f"{name.removesuffix('_s')} {1000 * value:.2f}" for name, value in asdict(constants).items())
    details = [asdict(one) | {"error": one.error} for one in found]
    _report(
        f"Stages that sleep {stage_ms:g} ms; beside it, measured first, in ms: {beside}",
        COLUMNS,
        rows(found),
        {"case": asdict(case), "constants": asdict(constants), "rows": details},
        json,
    )


@app.command()
def memory(kind: Kind = "t2v", pp: Stages = "2,4", json: Json = None) -> None:
    """Weights by rank, where text encoder and VAE are as heavy as the transformers: read, and resident; beside pp=1."""
    from benchmarks.memory import COLUMNS, measure, rows

    found = list(measure(_kind(kind), whole_numbers("pp", pp), teller()))
    title = f"A {kind} model of three equal thirds, float32"
    _report(title, COLUMNS, rows(found), {"rows": [asdict(row) for row in found]}, json)


@app.command()
def page(
    jobs: Annotated[int, typer.Option(help="In the list.", min=1)] = 200,
    ranks: Annotated[int, typer.Option(help="In the picture.", min=1)] = 8,
    seconds: Annotated[float, typer.Option(help="Of scrolling.", min=0.5)] = 10.0,
    json: Json = None,
) -> None:
    """The service's page in Chromium, before a service that only tells: frames while the list is scrolled."""
    from benchmarks.page import COLUMNS, PageCase, measure, rows

    case = PageCase(jobs, ranks, seconds)
    browser, found = measure(case, teller())
    title = f"{jobs} jobs, {ranks} ranks, scrolled for {seconds:g} s in Chromium {browser}"
    result = {"case": asdict(case), "browser": browser, "arms": {name: asdict(arm) for name, arm in found.items()}}
    _report(title, COLUMNS, rows(found), result, json)


@app.command()
def preview(
    pp: Annotated[int, typer.Option(help="Stages.", min=1)] = 2,
    requests: Annotated[int, typer.Option(help="In flight at once.", min=1)] = 2,
    steps: Steps = 4,
    runs: Runs = 4,
    json: Json = None,
) -> None:
    """What a preview at every step costs: 8 blocks of width 512 at 1,536 tokens."""
    from benchmarks.preview import COLUMNS, PreviewCase, time_previews

    case = PreviewCase(pp, requests, steps, runs)
    results = time_previews(case, DeviceConfig("cpu", pin_cores=True), teller())
    title = f"A preview at each of {steps} steps, pp={pp}, M={requests}, float32, {runs} runs: median (range)"
    _report(title, COLUMNS, beside_first(results, requests), {"case": asdict(case), "runs": plain(results)}, json)


@app.command()
def replicas(
    count: Annotated[int, typer.Option(help="Engines side by side, against one.", min=2)] = 2,
    launcher: Annotated[str, typer.Option(help="local or ray.")] = "ray",
    pp: Annotated[int, typer.Option(help="Stages of each; they sleep.", min=1)] = 2,
    in_flight: Annotated[int, typer.Option(help="Requests in flight in each.", min=1)] = 2,
    requests: Annotated[int, typer.Option(help="Of a run.", min=1)] = 24,
    stage_ms: Annotated[float, typer.Option(help="Sleep of a stage, for one forward.", min=0.1)] = 50.0,
    steps: Steps = 10,
    runs: Runs = 4,
    json: Json = None,
) -> None:
    """Several lines of sleeping stages behind one queue against one line."""
    from benchmarks.replicas import COLUMNS, ReplicasCase, rows, time_replicas

    line = ScheduleCase(pp, [in_flight], stage_ms / 1000, 3_000_000, steps, 2, runs)
    case = ReplicasCase(line, count, requests, one_of("launcher", launcher, Literal["local", "ray"]))
    results = time_replicas(case, teller())
    title = f"{requests} requests of {steps} steps, pp={pp} of {stage_ms:g} ms each, M={in_flight}, {runs} runs"
    _report(title, COLUMNS, rows(case, results), {"case": asdict(case), "runs": plain(results)}, json)


@app.command()
def plan(
    kind: Kind = "ti2v",
    pp: Stages = "1,2",
    requests: Annotated[int, typer.Option(help="Videos at once.", min=1)] = 3,
    steps: Steps = 4,
    runs: Runs = 4,
    json: Json = None,
) -> None:
    """The planner beside the engine on this CPU, one core a rank: seconds, weights, peak memory."""
    from benchmarks.prediction import COLUMNS, PredictionCase, compare, rows

    case = PredictionCase(_kind(kind), whole_numbers("pp", pp), requests, steps, runs)
    found = list(compare(case, teller()))
    _report(
        f"{requests} videos of a {kind} model, 1,536 tokens, {steps} steps, decoded, float32, {runs} runs",
        COLUMNS,
        list(rows(found)),
        {"case": asdict(case), "rows": [asdict(row) for row in found]},
        json,
    )


@app.command()
def traffic(device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu", json: Json = None) -> None:
    """Bytes that a rank sends for a forward, by axis: counted, beside the formula."""
    config = DeviceConfig(device)
    from benchmarks.traffic import measure

    found = measure(config, teller())
    _report(
        "The busiest rank, one forward, 4 blocks of width 96, 128 tokens, float32",
        ["axes", "counted", "computed", "formula"],
        [[row.parallel, f"{row.counted:,}", f"{row.computed:,}", row.formula] for row in found],
        {"rows": [asdict(row) for row in found]},
        json,
        device,
    )


def _kind(kind: str) -> WanKind:
    known: WanKind = one_of("kind", kind, Literal["ti2v", "t2v"])
    return known


def _report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    result: dict[str, Any],
    json: Path | None,
    device: str = "cpu",
) -> None:
    facts = {"machine": machine(device, "python -m benchmarks")}
    report(title, columns, rows, facts | result, json)


if __name__ == "__main__":
    run(app)
