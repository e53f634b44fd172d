"""`cineline eval compare`."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cineline.cli.options import Json
from cineline.core.output import whole_file

app = typer.Typer(help="Compare two videos, or two files of latents.", no_args_is_help=True)


@app.callback()
def _eval() -> None:
    """Keeps `compare` a command of its own."""


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(help="A video, or latents that --save-latents wrote.")],
    other: Annotated[Path, typer.Argument(help="Another of the same length and size.")],
    json: Json = None,
) -> None:
    """PSNR and SSIM between two videos or two files of latents; equal ones have no PSNR.

    An .mp4 has lost something of its own: .webp files and latents show small differences better.
    """
    from cineline.media.compare import compare_files

    found = compare_files(reference, other)
    psnr, worst = ("none" if value is None else f"{value:.2f} dB" for value in (found.psnr, found.worst_psnr))
    ssim = "none" if found.ssim is None else f"{found.ssim:.4f}"
    print(f"equal {'yes' if found.equal else 'no'}, largest difference {found.largest:g}")
    print(f"PSNR {psnr}, worst frame {worst}, SSIM {ssim}")
    if json is not None:
        with whole_file(json) as temporary:
            temporary.write_text(json_text.dumps(asdict(found), allow_nan=False) + "\n")
