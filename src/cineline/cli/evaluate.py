"""`cineline eval score | compare`."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cineline.cli.options import Json, one_of
from cineline.core.config import Dtype, ParallelConfig
from cineline.core.output import check_output, whole_file
from cineline.errors import InvalidConfig

app = typer.Typer(help="Judge a model's videos, or compare two files.", no_args_is_help=True)


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
    for file, suffix in ((sheet, ".png"), (json, ".json")):
        if file is not None:
            check_output(file, (suffix,))
    from cineline.engine.api import Engine, default_device
    from cineline.engine.hub import open_model
    from cineline.evaluation.scenes import held_out_scenes
    from cineline.evaluation.score import contact_sheet, show, tally
    from cineline.families.wan.spec import WanSpec

    scenes = held_out_scenes()
    if prompts > len(scenes):
        raise InvalidConfig(f"prompts={prompts} is more than the {len(scenes)} held-out scenes: use less.")
    spec = open_model(model)
    assert isinstance(spec, WanSpec)
    console = Console(stderr=True)
    device = device or default_device()
    with Engine(
        spec, ParallelConfig(pp), device=device, dtype=None if dtype is None else one_of("dtype", dtype, Dtype)
    ) as engine:
        side = min(spec.defaults["height"], spec.defaults["width"])
        shown = show(
            engine, scenes[:prompts], seed, image_to_video, side, lambda text: console.print(text, highlight=False)
        )
    from cineline.bench.report import machine, report

    counts = tally(shown)
    rows = [[name, f"{right} of {many}", f"{right / many:.0%}"] for name, (right, many) in counts.items()]
    if image_to_video:
        psnrs = sorted(one.first_frame_psnr for one in shown if one.first_frame_psnr is not None)
        rows.append(["first frame, dB", f"{psnrs[0]:.1f} to {psnrs[-1]:.1f}", f"{psnrs[len(psnrs) // 2]:.1f} median"])
    details = [
        {"prompt": one.scene.prompt, **asdict(one.verdict), "first_frame_psnr": one.first_frame_psnr} for one in shown
    ]
    title = f"{model}, {prompts} held-out prompts{', image to video' if image_to_video else ''}, seed {seed}: right"
    result = {"machine": machine(device), "counts": counts, "videos": details}
    report(title, ["property", "right", "share"], rows, result, json)
    if sheet is not None:
        with whole_file(sheet) as temporary:
            contact_sheet(shown).save(temporary)
        print(sheet)


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(help="A video, or latents that --save-latents wrote.")],
    other: Annotated[Path, typer.Argument(help="Another of the same length and size.")],
    json: Json = None,
) -> None:
    """PSNR and SSIM between two videos or two files of latents; equal ones have no PSNR.

    An .mp4 has lost something of its own: .webp files and latents show small differences better.
    """
    if json is not None:
        check_output(json, (".json",))
    from cineline.media.compare import compare_files

    found = compare_files(reference, other)
    psnr, worst = ("none" if value is None else f"{value:.2f} dB" for value in (found.psnr, found.worst_psnr))
    ssim = "none" if found.ssim is None else f"{found.ssim:.4f}"
    print(f"equal {'yes' if found.equal else 'no'}, largest difference {found.largest:g}")
    print(f"PSNR {psnr}, worst frame {worst}, SSIM {ssim}")
    if json is not None:
        with whole_file(json) as temporary:
            temporary.write_text(json_text.dumps(asdict(found), allow_nan=False) + "\n")
