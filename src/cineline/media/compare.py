"""How much two videos, or two files of latents, differ: PSNR and SSIM, from torchmetrics, frame by frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from cineline.core.extras import need
from cineline.core.output import ANIMATION_SUFFIXES, LATENT_SUFFIXES
from cineline.errors import InvalidRequest, reason, shown

WINDOW = 11
"""Side of SSIM's Gaussian window (Wang et al. 2004, Image Quality Assessment); smaller frames have no SSIM."""

VIDEO_PEAK = 255.0


@dataclass(frozen=True)
class Comparison:
    """What was measured between a reference and another.

    Attributes:
        equal: every value is the same.
        largest: difference of two values: grey levels of 255, or latents' own units.
        psnr: in dB, over all values; None where they are equal, or where a peak of 0 gives it no meaning. Latents'
            peak is the reference's range.
        worst_psnr: of the frame (or latent frame) that differs most.
        ssim: mean over the frames, 1 for equal ones; latents' channels count as frames. None for frames that are
            too small, or constant latents.
    """

    equal: bool
    largest: float
    psnr: float | None
    worst_psnr: float | None
    ssim: float | None


def compare_files(reference: Path, other: Path) -> Comparison:
    """Compare two video files or two latents files of one shape.

    Raises:
        InvalidRequest: a file cannot be read, or they cannot be compared.
        MissingLibrary: torchmetrics is not installed.
    """
    kinds = {path.suffix.lower() in LATENT_SUFFIXES for path in (reference, other)}
    if len(kinds) == 2:
        raise InvalidRequest(
            f"{shown(reference)} and {shown(other)} are a video and latents: give two files of one kind."
        )
    if kinds == {True}:
        both = [_latents(path) for path in (reference, other)]
        return compare(both[0], both[1], float(both[0].max() - both[0].min()), f"{shown(reference)} and {shown(other)}")
    return compare(_video(reference), _video(other), VIDEO_PEAK, f"{shown(reference)} and {shown(other)}")


def compare(reference: Iterable[Tensor], other: Iterable[Tensor], peak: float, names: str = "The two") -> Comparison:
    """Compare frames [C, H, W], one pair at a time.

    Raises:
        InvalidRequest: they differ in number or size.
        MissingLibrary: torchmetrics is not installed.
    """
    need("torchmetrics")
    largest = 0.0
    errors: list[float] = []
    similarities: list[float] = []
    for one, two in zip_longest(reference, other):
        if one is None or two is None or one.shape != two.shape:
            shapes = ["no frame" if frame is None else list(frame.shape) for frame in (one, two)]
            raise InvalidRequest(
                f"{names} differ in shape ({shapes[0]} and {shapes[1]} at frame {len(errors)}): "
                "give two of one length and size."
            )
        error = (one.double() - two.double()) ** 2
        largest = max(largest, float(error.max().sqrt()))
        errors.append(float(error.mean()))
        if min(one.shape[-2:]) >= WINDOW and peak:
            similarities.append(_ssim(one, two, peak))
    return Comparison(
        equal=largest == 0,
        largest=largest,
        psnr=_psnr(sum(errors) / len(errors), peak),
        worst_psnr=_psnr(max(errors), peak),
        ssim=sum(similarities) / len(similarities) if similarities else None,
    )


def _ssim(reference: Tensor, other: Tensor, peak: float) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    one, two = (frame.float().unsqueeze(1) for frame in (reference, other))
    similarity = structural_similarity_index_measure(two, one, data_range=peak, kernel_size=WINDOW)
    assert isinstance(similarity, Tensor)
    return float(similarity)


def _psnr(error: float, peak: float) -> float | None:
    return 10 * math.log10(peak**2 / error) if error and peak else None


def _latents(path: Path) -> Tensor:
    """[F', C, H', W'] of a file that `--save-latents` wrote."""
    try:
        tensors = load(path.read_bytes())  # the library opens no path that is not UTF-8
    except (OSError, SafetensorError) as error:
        raise InvalidRequest(
            f"{shown(path)} cannot be read ({reason(error)}): give a file that --save-latents wrote."
        ) from None
    latents: Tensor | None = tensors.get("latents")
    if latents is None or latents.ndim != 4:
        raise InvalidRequest(
            f"{shown(path)} holds no 'latents' of 4 dimensions: give a file that --save-latents wrote."
        )
    if not torch.isfinite(latents).all():
        raise InvalidRequest(f"{shown(path)} holds values that are not finite: it cannot be compared.")
    return latents.transpose(0, 1)


def _video(path: Path) -> Iterator[Tensor]:
    """Frames [3, H, W] of RGB, 0 to 255."""
    frames = _animation(path) if path.suffix.lower() in ANIMATION_SUFFIXES else _stream(path)
    count = 0
    try:
        for frame in frames:
            count += 1
            yield torch.from_numpy(frame).permute(2, 0, 1)
    except (OSError, IndexError, SyntaxError, av.FFmpegError) as error:
        raise InvalidRequest(
            f"{shown(path)} cannot be read as a video ({reason(error)}): give a file that Cineline wrote."
        ) from None
    if not count:
        raise InvalidRequest(f"{shown(path)} has no frames: give another.")


def _animation(path: Path) -> Iterator[np.ndarray]:
    with Image.open(path) as animation:
        for picture in ImageSequence.Iterator(animation):
            yield np.array(picture.convert("RGB"))


def _stream(path: Path) -> Iterator[np.ndarray]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")
