"""What a cache loses on a mini model: by threshold, against the same videos without it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.media.compare import VIDEO_PEAK, Comparison, compare
from training.scenes import Scene
from training.score import Shown, show

COLUMNS = ("threshold", "steps skipped", "PSNR, dB", "SSIM", "scenes right")


@dataclass(frozen=True)
class Loss:
    """Of one threshold.

    Attributes:
        threshold: None without a cache. skipped: share of the steps.
        psnr, ssim: of each video against that without a cache; a PSNR is left out where the two are equal.
        right: videos that show all that their prompts say. of: videos.
    """

    threshold: float | None
    skipped: float
    psnr: Sequence[float]
    ssim: Sequence[float]
    right: int
    of: int


def losses(
    engine: Engine, scenes: Sequence[Scene], seed: int, thresholds: Sequence[float], tell: Callable[[str], None]
) -> list[Loss]:
    """Without a cache, and with each threshold."""
    plain = show(engine, scenes, seed, False, tell)
    found = [Loss(None, 0.0, [], [], _right(plain), len(plain))]
    for threshold in thresholds:
        cache = f"mag:{threshold:g}"
        tell(f"--cache {cache}")
        job = engine.spec.resolve(VideoRequest(prompt=scenes[0].prompt, cache=cache), 0)
        shown = show(engine, scenes, seed, False, tell, cache)
        pairs = [_compared(one, other) for one, other in zip(plain, shown, strict=True)]
        psnr = [pair.psnr for pair in pairs if pair.psnr is not None]
        ssim = [pair.ssim for pair in pairs if pair.ssim is not None]
        found.append(Loss(threshold, len(job.skipped) / job.steps, psnr, ssim, _right(shown), len(shown)))
    return found


def _compared(one: Shown, other: Shown) -> Comparison:
    pictures = ([torch.from_numpy(frame).permute(2, 0, 1) for frame in each.frames] for each in (one, other))
    return compare(next(pictures), next(pictures), VIDEO_PEAK)


def _right(shown: Sequence[Shown]) -> int:
    return sum(all(one.verdict.matches(one.scene).values()) for one in shown)


def rows(found: Sequence[Loss]) -> list[list[str]]:
    """A row of `COLUMNS` for each, medians with the worst."""
    return [
        [
            "none" if one.threshold is None else f"{one.threshold:g}",
            f"{one.skipped:.0%}",
            _median(one.psnr, ".1f"),
            _median(one.ssim, ".3f"),
            f"{one.right} of {one.of}",
        ]
        for one in found
    ]


def _median(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}})" if values else ""


def as_json(found: Sequence[Loss]) -> Mapping[str, object]:
    """All of it."""
    return {"losses": [asdict(one) for one in found]}
