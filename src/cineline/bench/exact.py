"""What is equal, bit for bit, on the device at hand: the line at several cuts and fills, and diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cineline.bench.beside import WAIT_LIMIT_S
from cineline.bench.reference import reference
from cineline.core.config import DeviceConfig, Dtype, ModelFiles, ParallelConfig
from cineline.core.request import VideoRequest
from cineline.engine.api import Engine
from cineline.engine.hub import fetch_weights, open_model
from cineline.errors import InvalidConfig, shown
from cineline.families.wan.convert import convert
from cineline.families.wan.random_checkpoint import RandomConfig, save_random_checkpoint
from cineline.families.wan.shapes import WanKind
from cineline.families.wan.spec import WanSpec
from cineline.media.result import Video

SIZES = [(2, 2, 2), (3, 3, 3), (1, 5, 1)]
"""Height and width in units of the model's grid, latent frames; one row a request. Odd numbers of tokens too:
the last elements of a tensor may go through other code."""

COLUMNS = ("model", "axes", "in flight", "latents", "frames", "largest difference")


@dataclass(frozen=True)
class Equality:
    """One division and number in flight, against diffusers.

    Attributes:
        kind: of model. axes: of the division.
        latents, frames: of how many requests they are equal.
        requests: of how many.
        deviation: largest difference of two latents.
    """

    kind: str
    axes: str
    in_flight: int
    latents: int
    frames: int
    requests: int
    deviation: float

    @property
    def exact(self) -> bool:
        return self.latents == self.frames == self.requests


@dataclass(frozen=True)
class Compared:
    """A model, and the folder of the same weights that diffusers reads."""

    spec: WanSpec
    folder: Path


def models(model: str | None, files: ModelFiles, dtype: Dtype, temporary: Path) -> list[Compared]:
    """A model by name or by its files, which are converted for diffusers, or a random checkpoint of each kind.

    Args:
        dtype: that the files' weights of few bits are made in.

    Raises:
        InvalidConfig: the model is no Wan model. CheckpointError: it cannot be opened.
    """
    if model is not None or files.given:
        spec = open_model(model, files=files)
        if not isinstance(spec, WanSpec):
            raise InvalidConfig(
                f"model={shown(model)} is no Wan model, with whose pipelines of diffusers this compares: the tests "
                "of docs/models.md compare others."
            )
        fetch_weights(spec)  # diffusers reads them first
        if not files.given:
            return [Compared(spec, spec.folder)]
        convert(spec, temporary / "converted", dtype)
        return [Compared(spec, temporary / "converted")]
    kinds: tuple[WanKind, ...] = ("ti2v", "t2v", "i2v")
    made = [save_random_checkpoint(temporary / kind, RandomConfig(kind)) for kind in kinds]
    return [Compared(WanSpec.open(folder), folder) for folder in made]


def compare(
    model: Compared,
    config: DeviceConfig,
    arms: Iterable[ParallelConfig],
    in_flight: Sequence[int],
    tell: Callable[[str], None],
) -> Iterator[Equality]:
    """Compare each division with each number in flight: sizes, guidance and without, images where the model takes
    them."""
    spec, folder = model.spec, model.folder
    requests = _requests(spec)
    tell(f"{folder.name}: {len(requests)} requests through diffusers")
    expected: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for with_image in sorted({request.image is not None for request in requests}):
        with reference(folder, config, with_image) as pipeline:
            for number, request in enumerate(requests):
                if (request.image is not None) == with_image:
                    expected[number] = pipeline.latents(request)[0], pipeline.frames(request)
    for parallel in arms:
        for many in in_flight:
            tell(f"{folder.name}: {parallel}, {many} in flight")
            with Engine(spec, parallel, in_flight=many, **asdict(config)) as engine:
                videos = [handle.result(WAIT_LIMIT_S) for handle in [engine.submit(request) for request in requests]]
            row = Equality(spec.kind, str(parallel), many, 0, 0, len(videos), 0.0)
            yield _judged(row, videos, [expected[number] for number in range(len(videos))])


def rows(found: Iterable[Equality]) -> list[list[str]]:
    """A row of `COLUMNS` each."""
    return [
        [
            *(row.kind, row.axes, str(row.in_flight)),
            *(f"{equal} of {row.requests}" for equal in (row.latents, row.frames)),
            f"{row.deviation:.1e}",
        ]
        for row in found
    ]


def _judged(row: Equality, videos: Sequence[Video], expected: Sequence[tuple[np.ndarray, np.ndarray]]) -> Equality:
    pairs = [
        (video, torch.from_numpy(latents), frames) for video, (latents, frames) in zip(videos, expected, strict=True)
    ]
    return replace(
        row,
        latents=sum(torch.equal(video.latents, latents) for video, latents, _ in pairs),
        frames=sum(video.frames is not None and np.array_equal(video.frames, frames) for video, _, frames in pairs),
        deviation=max(float((video.latents - latents).abs().max()) for video, latents, _ in pairs),
    )


def _requests(spec: WanSpec) -> list[VideoRequest]:
    rows, columns = spec.grid
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
    two_experts = {"guidance_scale_2": 3.0} if spec.boundary_ratio is not None else {}
    images = {"ti2v": (None, image), "t2v": (None,), "i2v": (image,)}[spec.kind]
    return [
        VideoRequest(
            prompt=f"video number {number}",
            negative_prompt="blurry" if number == 0 else "",
            image=image,
            height=height * rows,
            width=width * columns,
            num_frames=(frames - 1) * spec.vae_frames + 1,
            num_inference_steps=4 + number,
            guidance_scale=1.0 if number == 1 else 4.0,
            seed=number,
            **two_experts,
        )
        for image in images
        for number, (height, width, frames) in enumerate(SIZES)
    ]
