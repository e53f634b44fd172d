"""`cineline calibrate-cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cineline.cli.options import Fields, Given, spread, teller
from cineline.core.config import DeviceConfig, ModelFiles, ParallelConfig
from cineline.core.image import load_image
from cineline.core.output import check_output
from cineline.core.request import VideoRequest
from cineline.engine.hub import open_model
from cineline.errors import InvalidConfig

_FIELDS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "guidance_scale_2", "solver")
_UNSET = dict.fromkeys(_FIELDS, "the model's default")
_DEVICES = ("device", "dtype", "vae_dtype")
_CHOSEN = {"device": "cuda where there is one", "dtype": "float32 on the CPU"}


@spread
def calibrate(
    *,
    model: Annotated[
        str | None, typer.Option(help="Folder, hub id, mini-ti2v or mini-t2v.", show_default=False)
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of its weights, such as fp16.", show_default=False)] = None,
    files: Annotated[Given, Fields(ModelFiles)],
    prompt: Annotated[
        list[str] | None, typer.Option(help="May be given again; four of different sorts.", show_default=False)
    ] = None,
    image: Annotated[Path | None, typer.Option(help="First frame, for I2V models.", show_default=False)] = None,
    fields: Annotated[Given, Fields(VideoRequest, _FIELDS, unset=_UNSET)],
    pp: Annotated[int, typer.Option(help="Pipeline stages.", min=1)] = 1,
    devices: Annotated[Given, Fields(DeviceConfig, _DEVICES, unset=_CHOSEN, given=True)],
) -> None:
    """Measure a model's ratios for --cache mag, into a file beside it.

    One full run for each prompt, nothing skipped: once for a model.
    """
    from cineline.families.wan.ratios import ratios_file, write_ratios
    from cineline.families.wan.spec import WanSpec

    if model is None and not files:
        raise InvalidConfig("There is no model: give --model, or its files with --transformer and the like.")
    spec = open_model(model, variant, ModelFiles(**files))
    if not isinstance(spec, WanSpec):
        raise InvalidConfig(f"{type(spec).__name__} has no steps to skip: give a Wan model.")

    check_output(ratios_file(spec), (".json",))  # before hours of runs

    from cineline.bench.calibrate import PROMPTS
    from cineline.bench.calibrate import calibrate as measure

    prompts = prompt or list(PROMPTS)
    given = fields | ({} if image is None else {"image": load_image(image)})
    job = spec.resolve(VideoRequest(prompt=prompts[0], **given), 0)
    measured = measure(spec, ParallelConfig(pp=pp), prompts, given, devices, teller())
    how = {
        "width": job.width,
        "height": job.height,
        "num_frames": job.num_frames,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale,
        **job.own_settings,
        "prompts": prompts,
    }
    print(write_ratios(spec, measured, how))
