"""`cineline serve`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from cineline.cli.launching import LAUNCHER, launcher_of, serve_where_not_first, stages_of
from cineline.cli.options import FILES, Fields, Given, Lora, LoraWay, PromptCache, one_of, spread
from cineline.core.config import DeviceConfig, ModelFiles, ParallelConfig, texts_of
from cineline.core.extras import need
from cineline.core.family import FamilySpec
from cineline.core.lora import LoraMode
from cineline.core.recovery import Recovery
from cineline.core.request import VideoRequest
from cineline.core.streams import console
from cineline.engine.api import Engine
from cineline.engine.auto import local_cluster, replicate
from cineline.engine.blueprint import default_device
from cineline.engine.hub import MINIS, open_model
from cineline.engine.lora import add_loras
from cineline.engine.prompts import PROMPT_CACHE
from cineline.engine.ray_launch import connect_ray, ray_devices
from cineline.engine.replica import ALONE, Replica
from cineline.engine.replicas import AnyEngine, Replicas, folder_of
from cineline.errors import InvalidConfig, shown
from cineline.server.settings import ServeConfig

_LINE, _RUN, _SERVICE = "The line", "The run", "The service"
_CHOSEN = {"device": "cuda where there is one", "dtype": "float32 on the CPU", "text_encoder": ""}
_KEPT = ("snapshot_every", "restarts")
_UNLESS_TORCHRUN = {"restarts": "3, under torchrun 0"}
_DEFAULTS = {"skip_guidance_at_one": ""}
"""Of requests that leave it out."""

MOST_REPLICAS = 100

_UNSET = {"data_dir": "cineline-data", "api_keys": "nobody needs one"}


def _option(panel: str, text: str, *names: str, **further: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **further)


@spread
def serve(
    *,
    model: Annotated[str | None, _option(_RUN, "A folder in diffusers format, a hub id, mini-t2v; mini-ti2v.")] = None,
    variant: Annotated[str | None, _option(_RUN, "Of its weights, such as fp16; the plain ones.")] = None,
    files: Annotated[Given, Fields(ModelFiles, panel=FILES)],
    lora: Lora = None,
    lora_mode: LoraWay = "merge",
    line: Annotated[Given, Fields(ParallelConfig, panel=_LINE, unset={"pp": "1, or torchrun's world"}, given=True)],
    in_flight: Annotated[int | None, _option(_LINE, "Requests that denoise at once; fills the line.", min=1)] = None,
    replicas: Annotated[str, _option(_LINE, "Lines side by side behind one queue; auto: the planner's; 1.")] = "1",
    devices: Annotated[Given, Fields(DeviceConfig, panel=_LINE, unset=_CHOSEN, given=True)],
    launcher: Annotated[str | None, _option(_LINE, LAUNCHER)] = None,
    recovery: Annotated[Given, Fields(Recovery, _KEPT, panel=_RUN, unset=_UNLESS_TORCHRUN)],
    prompt_cache: PromptCache = PROMPT_CACHE,
    defaults: Annotated[Given, Fields(VideoRequest, list(_DEFAULTS), panel=_RUN, unset=_DEFAULTS)],
    service: Annotated[Given, Fields(ServeConfig, panel=_SERVICE, unset=_UNSET)],
    alias: Annotated[
        list[str] | None, _option(_SERVICE, "A further name of the model, such as sora-2; may be given again.")
    ] = None,
    allow_image_hosts: Annotated[
        str | None, _option(_SERVICE, "Hosts whose images may be fetched, separated by commas; none.")
    ] = None,
    quiet: Annotated[bool, _option(_RUN, "Say nothing.", "--quiet")] = False,
) -> None:
    """Serve OpenAI's videos API: POST /v1/videos and the rest, with jobs that survive any end of this process."""
    launch = launcher_of(launcher)
    serve_where_not_first(launch, devices)
    need("fastapi")
    hosts = [] if allow_image_hosts is None else [host.strip().lower() for host in allow_image_hosts.split(",")]
    settings = ServeConfig(**service, aliases=tuple(alias or ()), image_hosts=tuple(hosts))
    spec = open_model(model, variant, ModelFiles(**files))
    spec = add_loras(spec, lora or [], one_of("lora_mode", lora_mode, LoraMode))
    run: Given = {"prompt_cache": prompt_cache, "launcher": launch, **devices, **recovery}
    if launch == "ray":
        connect_ray()  # here, where it may heed signals, and so that what it lacks is said at once
    if launch == "torchrun" and replicas != "1":
        raise InvalidConfig(f"replicas={shown(replicas)}: torchrun's world is one line; leave it out, or use Ray.")
    if replicas == "auto":
        parallel, in_flight, count = _planned(spec, line, in_flight, run)
    else:
        parallel = ParallelConfig(**{"pp": stages_of(line, launch), **line})
        count = _count(replicas)
    parallel = spec.place(parallel)
    from cineline.server.run import Served, serve

    screen = console(stderr=True)
    names = list(dict.fromkeys([_name(model, files), *settings.aliases]))
    make_engine = partial(_make_engine, spec, parallel, {"in_flight": in_flight, **run}, count)
    served = Served(spec, names, parallel, in_flight, make_engine, defaults, count)
    serve(served, settings, lambda text: None if quiet else screen.print(text, highlight=False, soft_wrap=True))


def _make_engine(spec: FamilySpec, parallel: ParallelConfig, options: Given, count: int, snapshots: Path) -> AnyEngine:
    def make(replica: Replica = ALONE) -> Engine:
        return Engine(spec, parallel, snapshot_dir=folder_of(snapshots, replica), replica=replica, live=True, **options)

    if count == 1:
        return make()
    snapshots.mkdir(exist_ok=True)  # the replicas' own are in it
    return Replicas(make, count)


def _count(replicas: str) -> int:
    if not (replicas.isascii() and replicas.isdigit() and len(replicas) < 10 and 1 <= int(replicas) <= MOST_REPLICAS):
        raise InvalidConfig(
            f"replicas={shown(replicas)} is not auto, nor a whole number from 1 to {MOST_REPLICAS}: give one of them."
        )
    return int(replicas)


def _planned(spec: FamilySpec, line: Given, in_flight: int | None, run: Given) -> tuple[ParallelConfig, int, int]:
    """What the planner makes of all devices: how a line is divided, its requests in flight, how many lines.

    Raises:
        InvalidConfig: it is told how, or can make nothing of them.
    """
    if line:
        told = ", ".join(f"--{name.replace('_', '-')}" for name in line)
        raise InvalidConfig(f"--replicas auto divides the model, too: leave out {told}, or give a number of replicas.")
    names = {name: run[name] for name in texts_of(DeviceConfig) if name in run}
    device = names.get("device") or default_device()
    config = DeviceConfig(**{"dtype": "float32" if device == "cpu" else "bfloat16", **names, "device": device})
    return replicate(spec, config, in_flight, ray_devices if run["launcher"] == "ray" else local_cluster)


def _name(model: str | None, files: Mapping[str, Path]) -> str:
    """What clients call it: a hub id or a mini's name as it is, a folder or the first of files alone by its own."""
    if model is None:
        return next((path.stem for path in files.values()), MINIS[0])
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model
