"""The rules for requests to a Wan model: what is left out is filled in, what breaks a rule is refused (no torch)."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

from cineline.core.image import load_image
from cineline.core.request import VideoRequest
from cineline.errors import InvalidRequest
from cineline.families.wan.job import WanJob
from cineline.families.wan.shapes import WanShapes

MOST = {"num_inference_steps": 10_000, "fps": 1_000}
"""Largest values that are not taken for a slip of the hand."""


class Rules:
    """A model's."""

    def __init__(self, model: WanShapes) -> None:
        self._wan = model

    def resolve(self, request: VideoRequest, number: int) -> WanJob:
        """The request with nothing left open, as job `number`.

        Raises:
            InvalidRequest: a field breaks one of the rules.
        """
        if not request.prompt.strip():
            raise InvalidRequest(f"prompt={request.prompt!r} is empty: describe the video in at least one word.")
        self._check_image(request)
        height, width = self._size(request)
        value = {name: self._default(request, name) for name in ("num_frames", "num_inference_steps", "fps")}
        for name in ("num_inference_steps", "fps"):
            if value[name] < 1:
                raise InvalidRequest(f"{name}={value[name]} is below 1: give 1 or more.")
            if value[name] > MOST[name]:
                raise InvalidRequest(f"{name}={value[name]} is above {MOST[name]}: give less.")
        frames = value["num_frames"]
        if frames < 1 or frames % self._wan.vae_frames != 1 % self._wan.vae_frames:
            below = max(1, (frames - 1) // self._wan.vae_frames * self._wan.vae_frames + 1)
            raise InvalidRequest(
                f"num_frames={frames} is not {self._wan.vae_frames}k+1: use {below} or {below + self._wan.vae_frames}."
            )
        self._check_length("num_frames", frames, (frames - 1) // self._wan.vae_frames + 1)
        seed = self._default(request, "seed")
        if not 0 <= seed < 2**63:
            raise InvalidRequest(f"seed={seed} is out of range: use 0 to 2**63 - 1.")
        scale = self._scale(request, "guidance_scale")
        assert scale is not None
        boundary = self._boundary(request)
        scale_2 = self._second_scale(request, boundary, scale)
        shift = self._default(request, "flow_shift")
        if shift is not None and not (math.isfinite(shift) and shift > 0):
            raise InvalidRequest(f"flow_shift={shift} is not a positive number: use 1 to 20.")
        return WanJob(
            id=number,
            prompt=request.prompt,
            negative_prompt=self._default(request, "negative_prompt"),
            height=height,
            width=width,
            num_frames=frames,
            steps=value["num_inference_steps"],
            branches=2 if scale > 1 else 1,
            texts=2 if scale > 1 else 1,
            chunks=(frames - 1) // self._wan.vae_frames + 1 if request.decode else 0,
            guidance_scale=scale,
            guidance_scale_2=scale_2,
            flow_shift=shift,
            boundary_ratio=boundary,
            seed=seed,
            fps=value["fps"],
            has_image=request.image is not None,
        )

    def _default(self, request: VideoRequest, name: str) -> Any:
        value = getattr(request, name)
        given = name in request.model_fields_set and value is not None
        return value if given else self._wan.defaults.get(name, value)

    def _check_image(self, request: VideoRequest) -> None:
        if self._wan.kind == "t2v" and request.image is not None:
            raise InvalidRequest(
                f"{self._wan.folder} is a text-to-video model and takes no image: leave it out, or use a TI2V or I2V "
                "model."
            )
        if self._wan.kind == "i2v" and request.image is None:
            raise InvalidRequest(f"{self._wan.folder} is an image-to-video model and needs an image: give one.")

    def _size(self, request: VideoRequest) -> tuple[int, int]:
        if request.image is not None and request.height is None and request.width is None:
            return self._size_like(load_image(request.image))
        size = self._default(request, "height"), self._default(request, "width")
        for name, pixels, step, scale in zip(
            ("height", "width"), size, self._wan.grid, self._wan.patch[1:], strict=True
        ):
            if pixels < 1 or pixels % step:
                below = max(1, pixels // step) * step
                raise InvalidRequest(
                    f"{name}={pixels} is not a positive multiple of {step} (VAE {self._wan.vae_scale} x patch "
                    f"{scale}): use {below} or {below + step}."
                )
            self._check_length(name, pixels, pixels // step)
        return size

    def _size_like(self, image: Image.Image) -> tuple[int, int]:
        """The image's aspect ratio at the default area, on the grid."""
        aspect = image.height / image.width
        area = self._wan.defaults["height"] * self._wan.defaults["width"]
        rows, columns = self._wan.grid
        height = max(1, round(math.sqrt(area * aspect) / rows)) * rows
        width = max(1, round(math.sqrt(area / aspect) / columns)) * columns
        self._check_length("height", height, height // rows)
        self._check_length("width", width, width // columns)
        return height, width

    def _check_length(self, name: str, value: int, tokens: int) -> None:
        limit = int(self._wan.transformer.get("rope_max_seq_len", 1024))
        if tokens > limit:
            raise InvalidRequest(f"{name}={value} makes {tokens} tokens, more than the model's {limit}: use less.")

    def _scale(self, request: VideoRequest, name: str) -> float | None:
        scale = self._default(request, name)
        if scale is not None and not math.isfinite(scale):
            raise InvalidRequest(f"{name}={scale} is not a finite number: use 1 for no guidance, or up to 20.")
        return None if scale is None else float(scale)

    def _boundary(self, request: VideoRequest) -> float | None:
        boundary: float | None = self._default(request, "boundary_ratio")
        if boundary is None:
            return self._wan.boundary_ratio
        if len(self._wan.experts) == 1:
            raise InvalidRequest(
                f"boundary_ratio={boundary} needs a model with two experts, {self._wan.folder} has one: leave it out."
            )
        if not 0 <= boundary <= 1:
            raise InvalidRequest(f"boundary_ratio={boundary} is outside 0 to 1: use a share such as 0.875.")
        return boundary

    def _second_scale(self, request: VideoRequest, boundary: float | None, scale: float) -> float | None:
        if boundary is None:
            if request.guidance_scale_2 is not None:
                raise InvalidRequest(
                    f"guidance_scale_2={request.guidance_scale_2} needs a model with two experts and a boundary_ratio: "
                    "leave it out."
                )
            return None
        second = self._scale(request, "guidance_scale_2")
        return scale if second is None else second
