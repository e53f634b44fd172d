"""`cineline generate`."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cineline.cli.batch import Outputs, Task, check_tasks, single_task, tasks_of_file
from cineline.cli.files import check_name, settle_files
from cineline.cli.options import FILES, Fields, Given, Lora, LoraWay, PromptCache, one_of, spread
from cineline.cli.progress import RequestProgress, make_view
from cineline.cli.resume import (
    Order,
    files_begun,
    is_restart,
    refuse_beside_resume,
    refuse_unfinished,
    store,
    tell_how_to_resume,
    tells_metadata,
)
from cineline.core.config import AXES, DeviceConfig, ModelFiles, ParallelConfig
from cineline.core.family import FamilySpec
from cineline.core.lora import LoraMode
from cineline.core.output import check_output
from cineline.core.recovery import Recovery
from cineline.core.request import Job, VideoRequest
from cineline.core.streams import console
from cineline.engine.api import Engine
from cineline.engine.blueprint import check_launcher, default_device
from cineline.engine.folder import entries_in
from cineline.engine.handle import RequestHandle
from cineline.engine.hub import MINIS, fetch_weights, missing_weights, open_model
from cineline.engine.launch import PROGRESS, Launcher, serve_torchrun_rank
from cineline.engine.lora import add_loras
from cineline.engine.prompts import PROMPT_CACHE, bytes_of
from cineline.engine.sink import Sink
from cineline.engine.torchrun import torchrun_rank, torchrun_world
from cineline.errors import CinelineError, InvalidRequest, OutputError, shown

if TYPE_CHECKING:
    from rich.console import Console

POLL_S = 0.1

NAMED = 5
"""Files that an error names at most, of those that are not there."""

_REQUEST, _PARALLEL, _RUN = "The request", "The line", "The run"
_OF_THE_MODEL = {"negative_prompt": "", "seed": "0", "skip_guidance_at_one": "", "num_videos": "1", "fit": "stretch"}
"""What a checkpoint or a line may say, which an option that is not there must not hide."""

_UNLESS_TORCHRUN = {"restarts": "3, under torchrun 0"}

_CHOSEN = {"device": "cuda where there is one", "dtype": "float32 on the CPU", "text_encoder": ""}
"""What the engine chooses; the last one's text begins with its default."""


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


@spread
def generate(
    *,
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.", show_default=False)] = None,
    model: Annotated[str | None, _option(_RUN, "A folder in diffusers format, a hub id, mini-t2v; mini-ti2v.")] = None,
    variant: Annotated[str | None, _option(_RUN, "Of its weights, such as fp16; the plain ones.")] = None,
    files: Annotated[Given, Fields(ModelFiles, panel=FILES)],
    lora: Lora = None,
    lora_mode: LoraWay = "merge",
    fields: Annotated[Given, Fields(VideoRequest, panel=_REQUEST, unset=_OF_THE_MODEL)],
    requests: Annotated[
        Path | None, _option(_RUN, "Many requests: a JSON object of request fields a line; options are defaults.")
    ] = None,
    output: Annotated[
        str | None,
        _option(_RUN, ".mp4, .mov, .mkv, .webp, .gif; of one frame .png, .jpg; NAME/ for a PNG a frame; out.mp4."),
    ] = None,
    output_dir: Annotated[Path | None, _option(_RUN, "Folder for 0001.mp4 and so on, by line.")] = None,
    name: Annotated[
        str | None, _option(_RUN, "Names in it, of {line}, {seed}, {video}, with .webp or / at their end; {line:04}.")
    ] = None,
    skip_existing: Annotated[bool, _option(_RUN, "Make only files that are not there.", "--skip-existing")] = False,
    overwrite: Annotated[bool, _option(_RUN, "Replace a batch's files that are there.", "--overwrite")] = False,
    save_latents: Annotated[
        Path | None, _option(_RUN, "Latents' .safetensors file (with --requests a folder); alone, no video is made.")
    ] = None,
    line: Annotated[Given, Fields(ParallelConfig, panel=_PARALLEL, unset={"pp": "1, or torchrun's world"}, given=True)],
    in_flight: Annotated[int | None, _option(_PARALLEL, "Requests that denoise at once; fills the line.")] = None,
    devices: Annotated[Given, Fields(DeviceConfig, panel=_PARALLEL, unset=_CHOSEN, given=True)],
    launcher: Annotated[str | None, _option(_PARALLEL, "local, torchrun, or ray; torchrun inside its world.")] = None,
    quiet: Annotated[bool, _option(_RUN, "No progress, no settings.", "--quiet")] = False,
    no_metadata: Annotated[
        bool, _option(_RUN, "Files do not say what made them (cineline show).", "--no-metadata")
    ] = False,
    trace: Annotated[Path | None, _option(_RUN, "Write a timeline for ui.perfetto.dev, .json.")] = None,
    recovery: Annotated[Given, Fields(Recovery, panel=_RUN, unset=_UNLESS_TORCHRUN)],
    prompt_cache: PromptCache = PROMPT_CACHE,
    resume: Annotated[
        Path | None, _option(_RUN, "Go on with what a --snapshot-dir has; model, requests and outputs come from there.")
    ] = None,
) -> None:
    """Generate a video from a prompt, or many from a file of requests.

    The models that ship, mini-ti2v and mini-t2v, draw one thing: a circle,
    square or triangle in red, green, blue, yellow, purple, orange, white or
    black, moving left, right, up or down, growing or shrinking, on a
    background of another of these colours. Other words do no harm.
    """
    launch = _launcher(launcher)
    screen = console(stderr=True)
    order = Order(model, variant, files, line, devices, in_flight, lora or [], lora_mode)
    outputs = Outputs(output, output_dir, save_latents, name, skip_existing or None, overwrite or None)
    if resume is not None:
        refuse_beside_resume(prompt, requests, fields, outputs, recovery)
        recovery["snapshot_dir"] = resume
        order = order.resumed(resume)
    bytes_of(prompt_cache)
    parallel = ParallelConfig(**{"pp": _stages(order.line, launch), **order.line})
    if launch == "torchrun" and torchrun_rank() != 0:
        config = DeviceConfig(**{"device": default_device(), **order.devices})
        sys.exit(serve_torchrun_rank(config.rank_environment(torchrun_world()[1])))

    asked = [] if resume is not None else _tasks(prompt, requests, fields, outputs)
    if resume is not None and not entries_in(resume):
        screen.print(f"{resume} has no request that is not done.", highlight=False, soft_wrap=True)
        return
    metadata = not no_metadata and (resume is None or tells_metadata(resume))
    folder = recovery.get("snapshot_dir")
    begun = files_begun(folder, asked, launch)
    if folder is not None and resume is None and begun is None:
        refuse_unfinished(folder)
    if trace is not None:
        check_output(trace, (".json",))
    if quiet:
        os.environ[PROGRESS] = "1"  # before the hub's library is loaded, which reads it then
    spec = open_model(order.model, order.variant, ModelFiles(**order.files))
    spec.place(parallel)  # whatever can be refused is, before anything is downloaded
    spec = add_loras(spec, order.loras, one_of("lora_mode", order.lora_mode, LoraMode))
    tasks, kept = settle_files(spec, asked if begun is None else [], requests, outputs, is_restart(launch))
    check_tasks(spec, tasks, requests)
    for path in [] if quiet else kept:
        screen.print(f"{path.name}: is there already", highlight=False, soft_wrap=True)
    if kept and not tasks:
        return
    _tell_of_download(spec, quiet, screen)
    if not quiet:
        ranks = "1 rank" if parallel.ranks == 1 else f"{parallel.ranks} ranks ({parallel})"
        called = _name_of(order.model, order.files, order.loras)
        screen.print(f"Loading {called} on {ranks}", highlight=False, soft_wrap=True)

    if folder is not None and resume is None and begun is None:
        fetch_weights(spec)  # which takes long, and what is kept then cannot be resumed
        store(folder, spec, asked, tasks, metadata)
    options = {**order.devices, **recovery, "in_flight": order.in_flight, "trace": trace, "launcher": launch}
    options["prompt_cache"] = prompt_cache
    _make(spec, parallel, options, tasks, begun, quiet, screen, metadata)


def _make(
    spec: FamilySpec,
    parallel: ParallelConfig,
    options: Mapping[str, Any],
    tasks: Sequence[Task],
    begun: Sequence[Path] | None,
    quiet: bool,
    screen: Console,
    metadata: bool,
) -> None:
    """All that is asked for.

    Args:
        options: of the engine.
        begun: files of a world that torchrun has started anew, of which the folder has what is left.
        metadata: whether files say what made them.

    Raises:
        CinelineError: the first cause, with the names of all that could not be made, after the others are.
    """
    folder, trace = options.get("snapshot_dir"), options["trace"]
    unmade: dict[Path, CinelineError] = {}
    try:
        with Engine(spec, parallel, **options) as engine:
            handles = [] if folder is None else engine.resume(folder)
            kept = {path for handle in handles for path in handle.outputs.values()}
            handles += _submit(engine, [task for task in tasks if not kept.issuperset(task.absolute)], unmade)
            unmade |= _lacking([path for path in begun or () if path not in kept])
            unmade |= _run(handles, quiet, screen, metadata)
    except OutputError as error:
        if trace is None or not unmade:
            raise
        unmade[trace] = error
    except (KeyboardInterrupt, SystemExit):
        tell_how_to_resume(folder, screen)
        raise
    if unmade:
        tell_how_to_resume(folder, screen)
        raise _told(unmade)


def _name_of(model: str | None, files: Given, loras: Sequence[str]) -> str:
    """What is loaded, as the user has called it."""
    names = ", ".join(path.name for path in files.values())
    given = [] if files and model is None else [model or MINIS[0]]
    return " with ".join([*given, *([names] if names else []), *(f"LoRA {lora}" for lora in loras)])


def _told(unmade: Mapping[Path, CinelineError]) -> CinelineError:
    """The first error, with the names of all the files that are not there."""
    first = next(iter(unmade.values()))
    if len(unmade) > 1 or not any(shown(path) in str(first) for path in unmade):
        names = [shown(path.name) for path in unmade]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        first.args = (f"{str(first).removesuffix('.')}; not made: {', '.join(names[:NAMED])}{more}.",)
    return first


def _tell_of_download(spec: FamilySpec, quiet: bool, screen: Console) -> None:
    """What comes from the hub before the ranks can start, and how much; then the hub's own progress, unless `quiet`."""
    missing = None if quiet else missing_weights(spec)
    if missing and missing.nbytes:
        size = f"{len(missing.files)} files, {missing.nbytes / 1e9:.2f} GB"
        screen.print(f"Downloading {missing.hub_id}: {size}", highlight=False, soft_wrap=True)


def _tasks(prompt: str | None, requests: Path | None, fields: Given, outputs: Outputs) -> list[Task]:
    check_name(outputs, requests is not None)
    if requests is None:
        if prompt is None and "image" not in fields:
            raise InvalidRequest("There is no prompt: give one, an --image, or --requests FILE.jsonl.")
        return [single_task(prompt or "", fields, outputs)]
    if prompt is not None:
        raise InvalidRequest(f"Both a prompt ({shown(prompt)}) and --requests {shown(requests)} are given: use one.")
    return tasks_of_file(requests, fields, outputs)


def _lacking(files: Sequence[Path]) -> dict[Path, CinelineError]:
    """Those of requests that were done with before torchrun started the world anew, and are not there."""
    error = OutputError("A request failed before torchrun's restart, and is not made again: see what was said then.")
    return {path: error for path in files if not path.exists()}


def _submit(engine: Engine, tasks: Sequence[Task], unmade: dict[Path, CinelineError]) -> list[RequestHandle]:
    """Those that the engine takes; why it does not take the others goes to `unmade`."""
    handles = []
    for task in tasks:
        try:
            handles.append(engine.submit(task.request, task.outputs))
        except InvalidRequest as error:
            unmade |= dict.fromkeys(task.outputs.values(), error)
    return handles


def _run(
    handles: list[RequestHandle], quiet: bool, screen: Console, metadata: bool = True
) -> dict[Path, CinelineError]:
    """Write each result as it comes; the files that could not be made, after the others are done."""
    unmade: dict[Path, CinelineError] = {}
    labels = [next(iter(handle.outputs.values()), Path()).name for handle in handles]
    if not quiet:
        for label, handle in zip(labels, handles, strict=True):
            step = handle.progress[0]
            where = f", goes on at step {step}" if step else ""
            screen.print(f"{label}: {_describe(handle.job)}{handle.fitting}{where}", highlight=False, soft_wrap=True)
    view = make_view(labels, quiet, screen)
    states = [RequestProgress.of(handle) for handle in handles]
    sinks = {
        number: Sink(handle, *map(handle.outputs.get, ("video", "latents", "frames")), metadata=metadata)
        for number, handle in enumerate(handles)
    }
    handles.clear()  # a sink that is done goes, and its video with it: that is large
    try:
        while sinks:
            time.sleep(POLL_S)
            for number, sink in list(sinks.items()):
                states[number] = RequestProgress.of(sink.handle)
                try:
                    _write(sink, states[number].done)
                except CinelineError as error:
                    sink.give_up(error)
                    sink.handle.park()  # nobody waits for it any more
                    unmade |= dict.fromkeys(sink.missing, error.with_traceback(None))  # which would hold the video
                else:
                    if not states[number].done:
                        continue
                    sink.handle.delivered()
                del sinks[number]
            view.update(states)
    finally:
        for sink in sinks.values():
            sink.give_up(KeyboardInterrupt())
        view.close()
    return unmade


def _write(sink: Sink, done: bool) -> None:
    """Write what there is of a result, and print the files once they are there.

    Raises:
        CinelineError: not all of them will be.
    """
    sink.update()
    if done:
        for path in sink.finish():
            print(path, flush=True)
        if sink.failed is not None:
            raise sink.failed


def _describe(job: Job) -> str:
    """The settings that the request runs with, given or not."""
    own = "".join(f", {name.replace('_', ' ')} {value}".rstrip() for name, value in job.own_settings.items())
    guidance = f"guidance {job.guidance_scale:g}" if job.branches > 1 else "no guidance"
    return (
        f"{job.width}x{job.height}, {job.num_frames} frames at {job.fps} fps, {job.steps} steps, "
        f"{guidance}{own}, seed {job.seed}"
    )


def _stages(line: Given, launcher: Launcher) -> int:
    """What the other axes leave of torchrun's world."""
    others = math.prod(line.get(axis, 1) for axis in AXES if axis != "pp")
    return torchrun_world()[0] // others or 1 if launcher == "torchrun" and others > 0 else 1


def _launcher(name: str | None) -> Launcher:
    if name is None:
        return "local" if torchrun_rank() is None else "torchrun"
    launcher: Launcher = one_of("launcher", name, Launcher)
    check_launcher(launcher)
    return launcher
