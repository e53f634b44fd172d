"""`cineline convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cineline.cli.options import Fields, Given, one_of, spread, teller
from cineline.core.config import Dtype, ModelFiles
from cineline.engine.hub import fetch_weights, open_model
from cineline.errors import InvalidConfig


@spread
def convert(
    *,
    to: Annotated[Path, typer.Option(help="The folder to write, which must not be there.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(help="A folder or hub id for what the files do not have.", show_default=False),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of its weights, such as fp16.", show_default=False)] = None,
    files: Annotated[Given, Fields(ModelFiles)],
    dtype: Annotated[
        str, typer.Option(help="Of weights in 8 bits or less, float32, bfloat16 or float16; others stay as they are.")
    ] = "bfloat16",
) -> None:
    """Write a model as a folder in diffusers format, whole or not at all.

    From files in any naming that generate takes; some rows of a tensor are in
    memory at once.
    """
    made: Dtype = one_of("dtype", dtype, Dtype)
    if model is None and not files:
        raise InvalidConfig("There is nothing to convert: give files with --transformer and the like, or --model.")
    spec = open_model(model, variant, ModelFiles(**files))

    from cineline.families.wan.convert import convert as write
    from cineline.families.wan.spec import WanSpec

    if not isinstance(spec, WanSpec):
        raise InvalidConfig(f"{type(spec).__name__} cannot be converted: give a Wan model.")
    fetch_weights(spec)
    write(spec, to, made, teller())
    print(to)
