"""The rules for requests to a Wan model: what is left out is filled in, what breaks a rule is refused (no torch)."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from cineline.core.image import called, load_image
from cineline.core.lora import choice
from cineline.core.request import MOST_SEED, VideoRequest, drawn
from cineline.errors import InvalidRequest, shown
from cineline.families.wan.job import WanJob
from cineline.families.wan.mag_cache import skipped_by
from cineline.families.wan.ratios import ratios_of
from cineline.families.wan.schedules import Schedule, is_given, with_preset
from cineline.families.wan.shapes import WanShapes

log = logging.getLogger(__name__)

MOST_FPS = 1_000
"""More are taken for a slip of the hand."""

SIDES = ("height", "width")


class Rules:
    """A model's."""

    def __init__(self, model: WanShapes) -> None:
        self._wan = model

    def resolve(self, request: VideoRequest, number: int) -> WanJob:
        """The request with nothing left open, as job `number`.

        Raises:
            InvalidRequest: a field breaks one of the rules.
        """
        request = with_preset(self._wan, request)
        if not request.prompt.strip() and request.image is None:
            raise InvalidRequest(
                f"prompt={shown(request.prompt)} is empty: describe the video in at least one word, or give an image."
            )
        self._check_image(request)
        height, width = self._size(request)
        fps, frames = self._fps(request), self._default(request, "num_frames")
        if frames < 1 or frames % self._wan.vae_frames != 1 % self._wan.vae_frames:
            below = max(1, (frames - 1) // self._wan.vae_frames * self._wan.vae_frames + 1)
            raise InvalidRequest(
                f"num_frames={shown(frames)} is not {self._wan.vae_frames}k+1: use {shown(below)} or "
                f"{shown(below + self._wan.vae_frames)}."
            )
        self._check_length("num_frames", frames, (frames - 1) // self._wan.vae_frames + 1)
        if request.last_image is not None and frames == 1:
            raise InvalidRequest(
                f"num_frames={shown(frames)} has no room for a last_image behind the first one: use "
                f"{1 + self._wan.vae_frames} or more."
            )
        seed = drawn(self._default(request, "seed"))
        if not 0 <= seed <= MOST_SEED:
            raise InvalidRequest(f"seed={shown(seed)} is out of range: use 0 to 2**64 - 1, or random.")
        scale = self._scale(request, "guidance_scale")
        assert scale is not None
        schedule = Schedule.of(self._wan, request, partial(self._default, request))
        scale_2 = self._second_scale(request, schedule, scale)
        shift = self._default(request, "flow_shift")
        if shift is not None and not (math.isfinite(shift) and shift > 0):
            raise InvalidRequest(f"flow_shift={shown(shift)} is not a positive number: use 1 to 20.")
        loras, lora_scales = choice(self._wan.loras, self._wan.lora_mode, request.loras) or (None, None)
        job = WanJob(
            id=number,
            prompt=request.prompt,
            negative_prompt=self._default(request, "negative_prompt"),
            height=height,
            width=width,
            num_frames=frames,
            **asdict(schedule),
            branches=2 if scale > 1 else 1,
            texts=2 if scale > 1 else 1,
            chunks=(frames - 1) // self._wan.vae_frames + 1 if request.decode else 0,
            guidance_scale=scale,
            guidance_scale_2=scale_2,
            flow_shift=shift,
            seed=seed,
            fps=fps,
            unguided=self._unguided(request, scale, scale_2),
            preview=request.preview,
            has_image=request.image is not None,
            loras=loras,
            lora_scales=lora_scales,
            cache=request.cache,
            ratios=None if request.cache is None else ratios_of(self._wan),
            has_last_image=request.last_image is not None,
        )
        high = self._wan.high_steps(job)
        return replace(job, skipped=skipped_by(job, [int(step >= high) for step in range(job.steps)]))

    def _default(self, request: VideoRequest, name: str) -> Any:
        value = getattr(request, name)
        return value if is_given(request, name) else self._wan.defaults.get(name, value)

    def _fps(self, request: VideoRequest) -> int:
        fps: int = self._default(request, "fps")
        if not 1 <= fps <= MOST_FPS:
            rule = "below 1: give 1 or more" if fps < 1 else f"above {MOST_FPS}: give less"
            raise InvalidRequest(f"fps={shown(fps)} is {rule}.")
        return fps

    def _check_image(self, request: VideoRequest) -> None:
        if self._wan.kind == "t2v" and request.image is not None:
            raise InvalidRequest(
                f"{shown(self._wan.folder)} is a text-to-video model and takes no image: leave it out, or use a TI2V "
                "or I2V model."
            )
        if self._wan.kind == "i2v" and request.image is None:
            raise InvalidRequest(f"{shown(self._wan.folder)} is an image-to-video model and needs an image: give one.")
        takes_last = self._wan.kind == "i2v" and self._wan.pictures != 1
        if request.last_image is not None and not takes_last:
            raise InvalidRequest(
                f"{shown(self._wan.folder)} is no image-to-video model with two experts (I2V-A14B), nor one of a first "
                "and a last frame, and takes no last_image: leave it out."
            )
        if request.last_image is None and self._wan.pictures == 2:
            raise InvalidRequest(
                f"{shown(self._wan.folder)} is a model of a first and a last frame and needs a last_image: give one."
            )

    def _size(self, request: VideoRequest) -> tuple[int, int]:
        given = request.height, request.width
        size = given
        if request.image is None:
            size = self._default(request, "height"), self._default(request, "width")
        for side, pixels in enumerate(size):
            if pixels is not None:
                self._check_side(side, pixels)
        height, width = size
        if height is not None and width is not None:
            return height, width
        assert request.image is not None  # every kind has a default size
        return self._size_like(request.image, height, width)

    def _check_side(self, side: int, pixels: int) -> None:
        name, step = SIDES[side], self._wan.grid[side]
        if pixels < 1 or pixels % step:
            below = max(1, pixels // step) * step
            raise InvalidRequest(
                f"{name}={shown(pixels)} is not a positive multiple of {step} (VAE {self._wan.vae_scale} x patch "
                f"{self._wan.patch[1 + side]}): use {shown(below)} or {shown(below + step)}."
            )
        self._check_length(name, pixels, pixels // step)

    def _size_like(self, given: Path | Image.Image, height: int | None, width: int | None) -> tuple[int, int]:
        """A size in the image's shape: from the side that is given, or at the default area where none is.

        What is not given is rounded to the nearest multiple of the grid, and is one multiple at least.
        """
        image = load_image(given)
        aspect, area = image.height / image.width, self._wan.defaults["height"] * self._wan.defaults["width"]
        wanted = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if height is not None:
            wanted = height, height / aspect
        elif width is not None:
            wanted = width * aspect, width
        tokens = [max(1, round(pixels / step)) for pixels, step in zip(wanted, self._wan.grid, strict=True)]
        for name, count, step in zip(SIDES, tokens, self._wan.grid, strict=True):
            if count > self._most_tokens:
                raise InvalidRequest(
                    f"{called(given)} has {image.width}x{image.height} pixels, and a video of that shape {name}="
                    f"{count * step}, which makes {count} tokens, more than the model's {self._most_tokens}: crop the "
                    "image, or give both height and width."
                )
        rows, columns = self._wan.grid
        return tokens[0] * rows, tokens[1] * columns

    @property
    def _most_tokens(self) -> int:
        """Along each of a video's three sides."""
        return int(self._wan.transformer.get("rope_max_seq_len", 1024))

    def _check_length(self, name: str, value: int, tokens: int) -> None:
        limit = self._most_tokens
        if tokens > limit:
            raise InvalidRequest(
                f"{name}={shown(value)} makes {shown(tokens)} tokens, more than the model's {limit}: use less."
            )

    def _scale(self, request: VideoRequest, name: str) -> float | None:
        scale = self._default(request, name)
        if scale is not None and not math.isfinite(scale):
            raise InvalidRequest(f"{name}={shown(scale)} is not a finite number: use 1 for no guidance, or up to 20.")
        return None if scale is None else float(scale)

    def _second_scale(self, request: VideoRequest, schedule: Schedule, scale: float) -> float | None:
        """The first one where that alone is given (as in diffusers), the model's own where neither is."""
        given = request.guidance_scale_2
        if schedule.boundary_ratio is None and schedule.switch_step is None:
            if given is not None:
                raise InvalidRequest(
                    f"guidance_scale_2={shown(given)} needs a model with two experts and a boundary_ratio or "
                    "switch_step: leave it out."
                )
            return None
        if given is None and request.guidance_scale is not None:
            return scale
        second = self._scale(request, "guidance_scale_2")
        if given is not None and given > 1 >= scale:
            log.warning(
                "guidance_scale_2=%s has no effect: as in diffusers there is no guidance where guidance_scale is 1 or "
                "less, and it is %s.",
                shown(given),
                shown(scale),
            )
        return scale if second is None else second

    def _unguided(self, request: VideoRequest, scale: float, scale_2: float | None) -> tuple[int, ...]:
        """The second expert, if it may go without its second forward: the first one's scale turns guidance on."""
        return (1,) if scale > 1 and scale_2 == 1 and self._default(request, "skip_guidance_at_one") else ()
