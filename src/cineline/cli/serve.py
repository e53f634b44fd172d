"""`cineline serve`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cineline.cli.options import FILES, Fields, Given, Lora, LoraWay, PromptCache, one_of, spread
from cineline.core.config import DeviceConfig, ModelFiles, ParallelConfig
from cineline.core.extras import need
from cineline.core.lora import LoraMode
from cineline.core.recovery import Recovery
from cineline.core.request import VideoRequest
from cineline.core.streams import console
from cineline.engine.api import Engine
from cineline.engine.hub import MINIS, open_model
from cineline.engine.lora import add_loras
from cineline.engine.prompts import PROMPT_CACHE
from cineline.server.settings import ServeConfig

_LINE, _RUN, _SERVICE = "The line", "The run", "The service"
_CHOSEN = {"device": "cuda where there is one", "dtype": "float32 on the CPU", "text_encoder": ""}
_KEPT = ("snapshot_every", "restarts")
_DEFAULTS = {"skip_guidance_at_one": ""}
"""Of requests that leave it out."""

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
    line: Annotated[Given, Fields(ParallelConfig, panel=_LINE, unset={"pp": "1"}, given=True)],
    in_flight: Annotated[int | None, _option(_LINE, "Requests that denoise at once; fills the line.", min=1)] = None,
    devices: Annotated[Given, Fields(DeviceConfig, panel=_LINE, unset=_CHOSEN, given=True)],
    recovery: Annotated[Given, Fields(Recovery, _KEPT, panel=_RUN)],
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
    need("fastapi")
    hosts = [] if allow_image_hosts is None else [host.strip().lower() for host in allow_image_hosts.split(",")]
    settings = ServeConfig(**service, aliases=tuple(alias or ()), image_hosts=tuple(hosts))
    spec = open_model(model, variant, ModelFiles(**files))
    spec = add_loras(spec, lora or [], one_of("lora_mode", lora_mode, LoraMode))
    parallel = spec.place(ParallelConfig(**line))
    from cineline.server.run import Served, serve

    def make_engine(snapshots: Path) -> Engine:
        own: Given = {"in_flight": in_flight, "prompt_cache": prompt_cache, "snapshot_dir": snapshots}
        return Engine(spec, parallel, live=True, **own, **devices, **recovery)

    screen = console(stderr=True)
    names = list(dict.fromkeys([_name(model, files), *settings.aliases]))
    served = Served(spec, names, parallel, in_flight, make_engine, defaults)
    serve(served, settings, lambda text: None if quiet else screen.print(text, highlight=False, soft_wrap=True))


def _name(model: str | None, files: Mapping[str, Path]) -> str:
    """What clients call it: a hub id or a mini's name as it is, a folder or the first of files alone by its own."""
    if model is None:
        return next((path.stem for path in files.values()), MINIS[0])
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model
