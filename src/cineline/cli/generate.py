"""`cineline generate`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cineline.cli.batch import Outputs, Task, check_tasks, single_task, tasks_of_file
from cineline.cli.options import one_of, whole_numbers
from cineline.cli.progress import RequestProgress, make_view
from cineline.core.config import DeviceConfig, Dtype, ExpertPlacement, ParallelConfig, TextEncoder, VaeDecode
from cineline.core.output import check_output
from cineline.core.request import Job
from cineline.engine.api import Engine
from cineline.engine.hub import MINIS, open_model
from cineline.engine.launch import Launcher, serve_torchrun_rank, torchrun_rank, torchrun_world
from cineline.engine.sink import Sink
from cineline.errors import CinelineError, InvalidConfig, InvalidRequest

POLL_S = 0.1

_REQUEST, _PARALLEL, _RUN = "The request", "The line", "The run"


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.", show_default=False)] = None,
    model: Annotated[str | None, _option(_RUN, "A folder in diffusers format, a hub id, mini-t2v; mini-ti2v.")] = None,
    negative_prompt: Annotated[str | None, _option(_REQUEST, "What it should not show.")] = None,
    image: Annotated[Path | None, _option(_REQUEST, "First frame, for models that take one.")] = None,
    height: Annotated[int | None, _option(_REQUEST, "Pixels, on the model's grid.")] = None,
    width: Annotated[int | None, _option(_REQUEST, "Pixels, on the model's grid.")] = None,
    num_frames: Annotated[int | None, _option(_REQUEST, "4k+1.")] = None,
    num_inference_steps: Annotated[int | None, _option(_REQUEST, "Solver steps.")] = None,
    guidance_scale: Annotated[float | None, _option(_REQUEST, "Classifier-free guidance, on above 1.")] = None,
    guidance_scale_2: Annotated[float | None, _option(_REQUEST, "The low-noise expert's.")] = None,
    flow_shift: Annotated[float | None, _option(_REQUEST, "The solver's time shift.")] = None,
    boundary_ratio: Annotated[float | None, _option(_REQUEST, "Where the low-noise expert takes over.")] = None,
    seed: Annotated[int | None, _option(_REQUEST, "Of the noise; 0.")] = None,
    fps: Annotated[int | None, _option(_REQUEST, "Frames a second of the file.")] = None,
    requests: Annotated[
        Path | None, _option(_RUN, "Many requests: a JSON object of request fields a line; options are defaults.")
    ] = None,
    output: Annotated[Path | None, _option(_RUN, "The video's file, .mp4, .mov, .mkv, .webp or .gif; out.mp4.")] = None,
    output_dir: Annotated[Path | None, _option(_RUN, "Folder for 0001.mp4 and so on, by line.")] = None,
    save_latents: Annotated[
        Path | None, _option(_RUN, "Latents' .safetensors file (with --requests a folder); alone, no video is made.")
    ] = None,
    pp: Annotated[int | None, _option(_PARALLEL, "Pipeline stages; 1, or torchrun's world.")] = None,
    split: Annotated[str | None, _option(_PARALLEL, "Blocks on each stage, such as 5,2,1.")] = None,
    cfg: Annotated[int, _option(_PARALLEL, "2 runs both branches of guidance at once, on a line each; 1.")] = 1,
    ulysses: Annotated[int, _option(_PARALLEL, "Ranks of a stage that share the tokens, by heads; 1.")] = 1,
    ring: Annotated[int, _option(_PARALLEL, "Ranks of a stage that share the tokens, in a ring; 1.")] = 1,
    tp: Annotated[int, _option(_PARALLEL, "Ranks of a stage that share each block's weights; 1.")] = 1,
    expert_placement: Annotated[
        str, _option(_PARALLEL, "shared, or split: the two experts on stages of their own; shared.")
    ] = "shared",
    text_split: Annotated[
        str | None, _option(_PARALLEL, "Layers of the text encoder on each stage, such as 10,14; balances weights.")
    ] = None,
    text_encoder: Annotated[
        str, _option(_PARALLEL, "resident; reload: in memory only while prompts are encoded; cpu: kept and run there.")
    ] = "resident",
    vae_decode: Annotated[
        str,
        _option(
            _PARALLEL,
            "layers: cut over the stages, exact; rows: each has some of the picture, close; tail: on the "
            "last stage; tiled: there, lossy; layers.",
        ),
    ] = "layers",
    vae_split: Annotated[
        str | None, _option(_PARALLEL, "Units of the VAE's decoder on each stage, such as 11,4; balances time.")
    ] = None,
    in_flight: Annotated[int | None, _option(_PARALLEL, "Requests that denoise at once; fills the line.")] = None,
    device: Annotated[str | None, _option(_PARALLEL, "cpu or cuda; cuda where there is one.")] = None,
    allow_untested_device: Annotated[
        bool, _option(_PARALLEL, "Let --device be another of torch's accelerators.", "--allow-untested-device")
    ] = False,
    dtype: Annotated[str | None, _option(_PARALLEL, "float32 or bfloat16; float32 on the CPU.")] = None,
    vae_dtype: Annotated[str, _option(_PARALLEL, "float32 or bfloat16; float32.")] = "float32",
    launcher: Annotated[str | None, _option(_PARALLEL, "local or torchrun; torchrun inside its world.")] = None,
    quiet: Annotated[bool, _option(_RUN, "No progress, no settings.", "--quiet")] = False,
    trace: Annotated[Path | None, _option(_RUN, "Write a timeline for ui.perfetto.dev, .json.")] = None,
) -> None:
    """Generate a video from a prompt, or many from a file of requests.

    The models that ship, mini-ti2v and mini-t2v, draw one thing: a circle,
    square or triangle in red, green, blue, yellow, purple, orange, white or
    black, moving left, right, up or down, growing or shrinking, on a
    background of another of these colours. Other words do no harm.
    """
    options = {
        "negative_prompt": negative_prompt,
        "image": image,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "flow_shift": flow_shift,
        "boundary_ratio": boundary_ratio,
        "seed": seed,
        "fps": fps,
    }
    fields = {name: value for name, value in options.items() if value is not None}
    axes = {"cfg": cfg, "ulysses": ulysses, "ring": ring, "tp": tp}
    parallel = ParallelConfig(
        _stages(pp, axes),
        None if split is None else whole_numbers("split", split),
        **axes,
        expert_placement=one_of("expert_placement", expert_placement, ExpertPlacement),
        text_split=None if text_split is None else whole_numbers("text_split", text_split, least=0),
        vae_split=None if vae_split is None else whole_numbers("vae_split", vae_split, least=0),
        vae_decode=one_of("vae_decode", vae_decode, VaeDecode),
    )
    console = Console(stderr=True)
    launch = _launcher(launcher)
    if launch == "torchrun" and torchrun_rank() != 0:
        config = DeviceConfig(device or "cpu", allow_untested_device=allow_untested_device)
        sys.exit(serve_torchrun_rank(config.rank_environment(torchrun_world()[1])))

    outputs = Outputs(output, output_dir, save_latents)
    if requests is None:
        if prompt is None:
            raise InvalidRequest("There is no prompt: give one, or --requests FILE.jsonl.")
        tasks = [single_task(prompt, fields, outputs)]
    elif prompt is not None:
        raise InvalidRequest(f"Both a prompt ({prompt!r}) and --requests {requests} are given: use one.")
    else:
        tasks = tasks_of_file(requests, fields, outputs)
    if trace is not None:
        check_output(trace, (".json",))
    spec = open_model(model)
    check_tasks(spec, tasks, requests)
    if not quiet:
        ranks = "1 rank" if parallel.ranks == 1 else f"{parallel.ranks} ranks ({parallel})"
        console.print(f"Loading {model or MINIS[0]} on {ranks}", highlight=False, soft_wrap=True)

    with Engine(
        spec,
        parallel,
        device=device,
        dtype=None if dtype is None else one_of("dtype", dtype, Dtype),
        vae_dtype=one_of("vae_dtype", vae_dtype, Dtype),
        text_encoder=one_of("text_encoder", text_encoder, TextEncoder),
        in_flight=in_flight,
        trace=trace,
        launcher=launch,
        allow_untested_device=allow_untested_device,
    ) as engine:
        failed = _run(engine, tasks, quiet, console)
    if failed:
        raise failed


def _run(engine: Engine, tasks: Sequence[Task], quiet: bool, console: Console) -> CinelineError | None:
    """Submit all, write each result as it comes; the first error, after the others are done."""
    handles = [engine.submit(task.request) for task in tasks]
    labels = [(task.video or task.latents or Path()).name for task in tasks]
    if not quiet:
        for label, handle in zip(labels, handles, strict=True):
            console.print(f"{label}: {_describe(handle.job)}", highlight=False, soft_wrap=True)
    view = make_view(labels, quiet, console)
    states = [RequestProgress.of(handle) for handle in handles]
    sinks = {
        number: Sink(handle, task.video, task.latents)
        for number, (task, handle) in enumerate(zip(tasks, handles, strict=True))
    }
    del handles  # a sink that is done goes, and its video with it: that is large
    failed: CinelineError | None = None
    try:
        while sinks:
            time.sleep(POLL_S)
            for number, sink in list(sinks.items()):
                states[number] = RequestProgress.of(sink.handle)
                try:
                    sink.update()
                    if states[number].done:
                        del sinks[number]
                        for path in sink.finish():
                            print(path, flush=True)
                except CinelineError as error:
                    failed = failed or error
                    sinks.pop(number, None)
                    sink.give_up(error)
                    sink.handle.cancel()  # nobody waits for it any more
            view.update(states)
    finally:
        for sink in sinks.values():
            sink.give_up(KeyboardInterrupt())
        view.close()
    return failed


def _describe(job: Job) -> str:
    """The settings that the request runs with, given or not."""
    own = "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in job.own_settings.items())
    return (
        f"{job.width}x{job.height}, {job.num_frames} frames at {job.fps} fps, {job.steps} steps, "
        f"guidance {job.guidance_scale:g}{own}, seed {job.seed}"
    )


def _stages(pp: int | None, axes: Mapping[str, int]) -> int:
    """As many stages as are given, else what the other axes leave of torchrun's world."""
    if pp is not None:
        return pp
    others = math.prod(axes.values())
    return torchrun_world()[0] // others or 1 if torchrun_rank() is not None and others > 0 else 1


def _launcher(name: str | None) -> Launcher:
    inside = torchrun_rank() is not None
    if name is None:
        return "torchrun" if inside else "local"
    if name == "local":
        return "local"
    if name != "torchrun":
        raise InvalidConfig(f"launcher={name!r} is not known: use local or torchrun.")
    if not inside:
        raise InvalidConfig("launcher='torchrun' needs a torchrun world: start with torchrun -m cineline generate.")
    return "torchrun"
