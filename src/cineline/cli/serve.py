"""`cineline serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cineline.cli.options import Fields, Given, spread
from cineline.core.config import DeviceConfig, ParallelConfig
from cineline.core.extras import need
from cineline.core.recovery import Recovery
from cineline.core.streams import console
from cineline.engine.api import Engine
from cineline.engine.hub import MINIS, open_model
from cineline.server.settings import ServeConfig

_LINE, _RUN, _SERVICE = "The line", "The run", "The service"
_CHOSEN = {"device": "cuda where there is one", "dtype": "float32 on the CPU", "text_encoder": ""}
_KEPT = ("snapshot_every", "restarts")
_UNSET = {"data_dir": "cineline-data", "api_keys": "nobody needs one"}


@spread
def serve(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder in diffusers format, a hub id, mini-t2v; mini-ti2v.",
            rich_help_panel=_RUN,
            show_default=False,
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Of its weights, such as fp16.", rich_help_panel=_RUN, show_default=False)
    ] = None,
    line: Annotated[Given, Fields(ParallelConfig, panel=_LINE, unset={"pp": "1"}, given=True)],
    in_flight: Annotated[
        int | None,
        typer.Option(
            help="Requests that denoise at once; fills the line.", rich_help_panel=_LINE, show_default=False, min=1
        ),
    ] = None,
    devices: Annotated[Given, Fields(DeviceConfig, panel=_LINE, unset=_CHOSEN, given=True)],
    recovery: Annotated[Given, Fields(Recovery, _KEPT, panel=_RUN)],
    service: Annotated[Given, Fields(ServeConfig, panel=_SERVICE, unset=_UNSET)],
    alias: Annotated[
        list[str] | None,
        typer.Option(
            help="A further name of the model, such as sora-2; may be repeated.",
            rich_help_panel=_SERVICE,
            show_default=False,
        ),
    ] = None,
    allow_image_hosts: Annotated[
        str | None,
        typer.Option(
            help="Hosts whose images may be fetched, separated by commas; none.",
            rich_help_panel=_SERVICE,
            show_default=False,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing.", rich_help_panel=_RUN)] = False,
) -> None:
    """Serve OpenAI's videos API: POST /v1/videos and the rest, with jobs that survive any end of this process."""
    need("fastapi")
    hosts = [] if allow_image_hosts is None else [host.strip().lower() for host in allow_image_hosts.split(",")]
    settings = ServeConfig(**service, aliases=tuple(alias or ()), image_hosts=tuple(hosts))
    parallel = ParallelConfig(**line)
    spec = open_model(model, variant)
    parallel = spec.place(parallel)
    from cineline.server.run import Served, serve

    def make_engine(snapshots: Path) -> Engine:
        return Engine(spec, parallel, in_flight=in_flight, snapshot_dir=snapshots, **devices, **recovery)

    screen = console(stderr=True)
    names = list(dict.fromkeys([_name(model), *settings.aliases]))
    served = Served(spec, names, parallel, in_flight, make_engine)
    serve(served, settings, lambda text: None if quiet else screen.print(text, highlight=False, soft_wrap=True))


def _name(model: str | None) -> str:
    """What clients call it: a hub id or a mini's name as it is, a folder by its own name."""
    if model is None:
        return MINIS[0]
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model
