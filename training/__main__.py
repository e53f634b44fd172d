"""`python -m training MODEL [STAGE]`: makes a mini model, up to a stage."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from training.making import Making

Name = Literal["mini-ti2v", "mini-t2v"]
Stage = Literal["vae", "latents", "pictures", "video", "experts", "export"]


def main(
    name: Annotated[Name, typer.Argument(help="The model.")],
    stage: Annotated[Stage, typer.Argument(help="The last stage that is run; the ones before it are too.")] = "export",
) -> None:
    """Make a mini model, or go on with it."""
    making = Making(name)
    if stage == "export":
        making.export()
    else:
        getattr(making, stage)


typer.run(main)
