"""`python -m training make MODEL [STAGE]` makes a mini model, `python -m training score` judges one, `python
-m training cache` says what cached steps lose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cineline.bench.report import machine, report
from cineline.cli import run
from cineline.cli.options import Json, one_of, teller
from cineline.core.config import Dtype, ParallelConfig
from cineline.core.output import check_output, whole_file
from cineline.errors import InvalidConfig
from training.scenes import HELD_OUT, held_out_scenes

Name = Literal["mini-ti2v", "mini-t2v"]
Stage = Literal["vae", "latents", "pictures", "video", "experts", "export"]

app = typer.Typer(help="Make the mini models, and judge them.", no_args_is_help=True, add_completion=False)


@app.command()
def make(
    name: Annotated[Name, typer.Argument(help="The model.")],
    stage: Annotated[Stage, typer.Argument(help="The last stage that is run; the ones before it are too.")] = "export",
) -> None:
    """Make a mini model, or go on with it."""
    from training.making import Making

    making = Making(name)
    if stage == "export":
        making.export()
    else:
        getattr(making, stage)


@app.command()
def score(
    model: Annotated[str, typer.Option(help="Folder, hub id, mini-ti2v or mini-t2v.")] = "mini-ti2v",
    prompts: Annotated[int, typer.Option(help="Of the scenes that no mini model was trained on.", min=1)] = 64,
    image_to_video: Annotated[
        bool, typer.Option("--image-to-video", help="Give each scene's first frame beside its prompt.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the others follow.", min=0)] = 0,
    pp: Annotated[int, typer.Option(help="Pipeline stages.", min=1)] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default=False)] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Picture with frames of every video, .png.", show_default=False)
    ] = None,
    json: Json = None,
) -> None:
    """Make videos of held-out scenes with the default settings; say how many show what their prompt says."""
    if sheet is not None:
        check_output(sheet, (".png",))
    if prompts > HELD_OUT:
        raise InvalidConfig(f"prompts={prompts} is more than the {HELD_OUT} held-out scenes: use less.")
    from cineline.engine.api import Engine
    from cineline.engine.blueprint import default_device
    from training.score import as_json, contact_sheet, rows, show

    device = device or default_device()
    known = None if dtype is None else one_of("dtype", dtype, Dtype)
    with Engine(model, ParallelConfig(pp), device=device, dtype=known) as engine:
        shown = show(engine, held_out_scenes()[:prompts], seed, image_to_video, teller())
    title = f"{model}, {prompts} held-out prompts{', image to video' if image_to_video else ''}, seed {seed}: right"
    result = {"machine": machine(device, "python -m training")} | as_json(shown)
    report(title, ["property", "right", "share"], rows(shown), result, json)
    if sheet is not None:
        with whole_file(sheet) as temporary:
            contact_sheet(shown).save(temporary)
        print(sheet)


@app.command()
def cache(
    model: Annotated[str, typer.Option(help="Folder, hub id, mini-ti2v or mini-t2v.")] = "mini-ti2v",
    prompts: Annotated[int, typer.Option(help="Of the held-out scenes.", min=1, max=HELD_OUT)] = 64,
    threshold: Annotated[
        list[float] | None, typer.Option(help="Of --cache mag; may be given again; four of them.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the others follow.", min=0)] = 0,
    pp: Annotated[int, typer.Option(help="Pipeline stages.", min=1)] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default=False)] = None,
    json: Json = None,
) -> None:
    """What --cache mag loses: videos of held-out scenes with it, against the same without."""
    from cineline.engine.api import Engine
    from cineline.engine.blueprint import default_device
    from training.caching import COLUMNS, as_json, losses, rows

    device = device or default_device()
    with Engine(model, ParallelConfig(pp), device=device) as engine:
        found = losses(engine, held_out_scenes()[:prompts], seed, threshold or [0.03, 0.06, 0.12, 0.24], teller())
    title = f"--cache mag on {model}, {prompts} held-out prompts, seed {seed}: median (worst) against no cache"
    report(title, COLUMNS, rows(found), {"machine": machine(device, "python -m training"), **as_json(found)}, json)


if __name__ == "__main__":
    run(app)
