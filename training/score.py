"""A model's score: videos of scenes, and whether each one shows what its prompt says."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.families.wan.spec import WanSpec
from cineline.media.compare import VIDEO_PEAK, compare
from training.judge import Verdict, judge
from training.scenes import Scene, first_frame

WAIT_LIMIT_S = 6 * 3600.0
"""For one video; a real model on a CPU takes hours."""

SHOWN_FRAMES = 5
CAPTION_LINES, LINE_PIXELS = 2, 12
"""Of the contact sheet."""


@dataclass(frozen=True)
class Shown:
    """A scene and what the model made of it.

    Attributes:
        first_frame_psnr: in dB, of the first frame against the image that was given; None without one.
        frames: uint8 [F, H, W, 3].
    """

    scene: Scene
    verdict: Verdict
    first_frame_psnr: float | None
    frames: NDArray[np.uint8]


def show(
    engine: Engine,
    scenes: Sequence[Scene],
    seed: int,
    with_image: bool,
    tell: Callable[[str], None],
    cache: str | None = None,
) -> list[Shown]:
    """Generate each scene's video from its prompt (and first frame), scene i with seed + i, in the default size.

    Args:
        cache: of all requests.
    """
    assert isinstance(engine.spec, WanSpec)
    side = min(engine.spec.defaults["height"], engine.spec.defaults["width"])
    images = [first_frame(scene, side) if with_image else None for scene in scenes]
    requests = [
        VideoRequest(
            prompt=scene.prompt,
            seed=seed + number,
            image=None if image is None else Image.fromarray(image),
            cache=cache,
        )
        for number, (scene, image) in enumerate(zip(scenes, images, strict=True))
    ]
    handles = [engine.submit(request) for request in requests]
    shown = []
    for scene, image, handle in zip(scenes, images, handles, strict=True):
        frames = handle.result(WAIT_LIMIT_S).frames
        assert frames is not None
        verdict = judge(frames)
        shown.append(Shown(scene, verdict, None if image is None else _psnr(image, frames[0]), frames))
        wrong = [name for name, right in verdict.matches(scene).items() if not right]
        tell(f"{len(shown)}/{len(scenes)} {scene.prompt}: {'wrong ' + ', '.join(wrong) if wrong else 'right'}")
    return shown


def _psnr(image: NDArray[np.uint8], frame: NDArray[np.uint8]) -> float:
    height, width = frame.shape[:2]
    wanted = np.array(Image.fromarray(image).resize((width, height)))
    one, two = (torch.from_numpy(picture).permute(2, 0, 1) for picture in (wanted, frame))
    psnr = compare([one], [two], VIDEO_PEAK).psnr
    return math.inf if psnr is None else psnr


def tally(shown: Iterable[Shown]) -> dict[str, tuple[int, int]]:
    """How many are right, of how many: for each property, and for each value of shape and motion."""
    counts: dict[str, tuple[int, int]] = {}
    for one in shown:
        for name, right in one.verdict.matches(one.scene).items():
            keys = [name, f"{name}: {getattr(one.scene, name)}"] if name in ("shape", "motion") else [name]
            for key in keys:
                good, all_of_them = counts.get(key, (0, 0))
                counts[key] = good + right, all_of_them + 1
    return dict(sorted(counts.items()))


def rows(shown: Sequence[Shown]) -> list[list[str]]:
    """Property, how many are right, their share; with images also how near the first frames are."""
    found = [[name, f"{right} of {many}", f"{right / many:.0%}"] for name, (right, many) in tally(shown).items()]
    psnrs = sorted(one.first_frame_psnr for one in shown if one.first_frame_psnr is not None)
    if psnrs:
        found.append(["first frame, dB", f"{psnrs[0]:.1f} to {psnrs[-1]:.1f}", f"{psnrs[len(psnrs) // 2]:.1f} median"])
    return found


def as_json(shown: Sequence[Shown]) -> dict[str, Any]:
    """Counts and every verdict."""
    videos = [
        {"prompt": one.scene.prompt, **asdict(one.verdict), "first_frame_psnr": one.first_frame_psnr} for one in shown
    ]
    return {"counts": tally(shown), "videos": videos}


def contact_sheet(shown: Sequence[Shown], columns: int = 2) -> Image.Image:
    """A few frames of each video beside each other, under its prompt."""
    height, width = shown[0].frames.shape[1:3]
    strip = width * SHOWN_FRAMES
    cell = height + CAPTION_LINES * LINE_PIXELS + 8
    sheet = Image.new("RGB", (columns * (strip + 8), -(-len(shown) // columns) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for number, one in enumerate(shown):
        x, y = number % columns * (strip + 8) + 4, number // columns * cell
        lines = textwrap.wrap(one.scene.prompt, max(1, strip // 6))[:CAPTION_LINES]
        pen.multiline_text((x, y), "\n".join(lines), fill="black", spacing=0)
        picked = one.frames[np.linspace(0, len(one.frames) - 1, SHOWN_FRAMES).astype(int)]
        sheet.paste(Image.fromarray(np.concatenate(list(picked), axis=1)), (x, y + CAPTION_LINES * LINE_PIXELS + 2))
    return sheet
