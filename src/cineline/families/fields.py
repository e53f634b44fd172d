"""A request's fields as a model's rules need them (no torch)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from cineline.core.request import MOST_SEED, VideoRequest, drawn
from cineline.errors import InvalidRequest, shown

COMMON = ("prompt", "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale", "sigmas", "seed")
ENGINES = ("fps", "decode", "timeout_s", "num_videos")
"""Fields that every family has, and those that no model need know."""

MOST_STEPS = 10_000
"""More are taken for a slip of the hand."""


class Fields:
    """A request to a model; what it leaves out has the model's defaults.

    Args:
        folder: the model's, for sentences.
        known: fields of the model's own, beside the common ones.

    Raises:
        InvalidRequest: another field is given, or the prompt is empty.
    """

    def __init__(
        self, request: VideoRequest, defaults: Mapping[str, Any], folder: Path, known: Collection[str] = ()
    ) -> None:
        self._request, self._defaults = request, defaults
        for name in sorted(request.model_fields_set - {*COMMON, *ENGINES, *known}):
            value = getattr(request, name)
            if value is not None and value != VideoRequest.model_fields[name].default:
                raise InvalidRequest(f"{name}={shown(value)} is not for {shown(folder)}: leave it out.")
        if not request.prompt.strip():
            raise InvalidRequest(f"prompt={shown(request.prompt)} is empty: say in at least one word what to make.")

    def value(self, name: str) -> Any:
        """As given, else the model's default, else the field's own."""
        given = getattr(self._request, name)
        told = name in self._request.model_fields_set and given is not None
        return given if told else self._defaults.get(name, given)

    def side(self, name: str, step: int, most: int) -> int:
        """Pixels, a multiple of `step`, at most `most` of them."""
        pixels: int = self.value(name)
        if pixels < 1 or pixels % step:
            below = max(1, pixels // step) * step
            raise InvalidRequest(
                f"{name}={shown(pixels)} is not a positive multiple of {step}: use {shown(below)} or "
                f"{shown(below + step)}."
            )
        if pixels > step * most:
            raise InvalidRequest(f"{name}={shown(pixels)} is above the model's {step * most}: use less.")
        return pixels

    def whole(self, name: str, most: int) -> int:
        """From 1 to `most`."""
        value: int = self.value(name)
        if not 1 <= value <= most:
            raise InvalidRequest(f"{name}={shown(value)} is not from 1 to {most}: give one of these.")
        return value

    def scale(self, name: str = "guidance_scale") -> float:
        """A finite number."""
        scale = float(self.value(name))
        if not math.isfinite(scale):
            raise InvalidRequest(f"{name}={shown(scale)} is not a finite number: use 1 for no guidance, or up to 20.")
        return scale

    def sigmas(self) -> tuple[float, ...] | None:
        """Noise levels from 1 at most to above 0, falling, one a step; None for the model's own."""
        sigmas: tuple[float, ...] | None = self.value("sigmas")
        if sigmas is None:
            return None
        levels = (math.nextafter(1, 2), *sigmas, 0.0)
        if not sigmas or any(not above > below for above, below in pairwise(levels)):
            raise InvalidRequest(
                f"sigmas={shown(sigmas)} do not fall from 1 at most to above 0: give noise levels such as "
                "1,0.75,0.5,0.25."
            )
        steps = self._request.num_inference_steps
        if steps not in (None, len(sigmas)):
            raise InvalidRequest(
                f"sigmas={shown(sigmas)} are {len(sigmas)} steps and num_inference_steps={shown(steps)}: give a level "
                "for each step, or leave one of the two out."
            )
        return sigmas

    def steps(self) -> int:
        """As many as there are sigmas, where these are given."""
        sigmas = self.sigmas()
        return self.whole("num_inference_steps", MOST_STEPS) if sigmas is None else len(sigmas)

    def seed(self) -> int:
        """Of the noise."""
        seed = drawn(self.value("seed"))
        if not 0 <= seed <= MOST_SEED:
            raise InvalidRequest(f"seed={shown(seed)} is out of range: use 0 to 2**64 - 1, or random.")
        return seed
