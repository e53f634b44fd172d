"""From the fields that a client sends to a request that the model can make, or to a refusal that says what would work.

Names are `VideoRequest`'s and OpenAI's; the second names of others' services are taken where they mean the same.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image

from cineline.core.family import FamilySpec, GriddedFamily
from cineline.core.request import MOST_STEPS, Job, VideoRequest, with_seed
from cineline.errors import InvalidRequest, shown
from cineline.server.fair import WEIGHTS
from cineline.server.fields import OFFERED
from cineline.server.refusal import Refusal, invalid, refused

Priority = Literal["low", "normal", "high"]

REFERENCE = "input_reference"

PICTURES: Mapping[str, str] = {
    REFERENCE: "image",
    "image": "image",
    "image_reference": "image",
    "last_image": "last_image",
    "last_frame": "last_image",
}
"""Fields with an image, and the request's that it is for: OpenAI's, `VideoRequest`'s, vLLM-Omni's, LLMGateway's."""

TEXT_LIMIT = 20_000
"""Characters of a prompt; the model reads 512 tokens."""

LIST_LIMIT = MOST_STEPS
"""Items: of noise levels one a step, and nobody has as many LoRAs."""

USER_LIMIT = 256
SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
DECIMAL = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
NEAR = 1e-6
"""Of a frame: what decimal seconds may be off."""


KNOWN = (*OFFERED, "model", "seconds", "size", *PICTURES, "priority", "user")


@dataclass(frozen=True)
class Order:
    """What a client wants, with nothing left to be refused.

    Attributes:
        request: its images, if it has any, in memory. job: the request as it will run.
        said: what answers repeat. priority: its share of the line.
    """

    request: VideoRequest
    job: Job
    said: Mapping[str, Any]
    priority: str

    @property
    def work(self) -> float:
        """Steps times forwards times pixels, in millions: alike for jobs that take alike."""
        job = self.job
        return job.steps * job.branches * job.num_frames * job.height * job.width / 1e6


@dataclass(frozen=True)
class Orders:
    """Reads what clients send.

    Attributes:
        spec: the model's. names: it goes by, its own first. defaults: of a request's fields.
        fit_sizes: take the nearest size.
        check: the request as it would run; raises `InvalidRequest`.
    """

    spec: FamilySpec
    names: Sequence[str]
    defaults: Mapping[str, Any]
    fit_sizes: bool
    check: Callable[[VideoRequest], Job]

    def read(self, given: Mapping[str, Any], images: Mapping[str, Image.Image], highest: str = "high") -> Order:
        """The order.

        Args:
            given: the fields, without references to images. images: by the request's fields.
            highest: priority that the client may ask for.

        Raises:
            Refusal: a field that is unknown, or cannot be used.
        """
        fields = {**self.defaults, **{name: value for name, value in given.items() if value is not None}}
        _check_known(fields)
        for name, value in fields.items():
            _check_text(name, value)
        model = self._model(fields.pop("model", self.names[0]))
        priority = _priority(fields.pop("priority", None), highest)
        said = {"model": model, "user": _user(fields.pop("user", None)), "priority": priority}
        seconds = fields.pop("seconds", None)
        said["requested_size"] = self._take_size(fields)
        if "prompt" not in fields:
            raise invalid("The request has no 'prompt': say what the video shows.", "prompt", "missing_field")
        if fields.get("num_videos", 1) != 1:
            raise invalid(
                f"num_videos={shown(fields['num_videos'])} is not 1, and a job is one video: send a request for each.",
                "num_videos",
            )
        fields.update(images)
        try:
            if seconds is not None:
                self._take_seconds(fields, seconds)
            request = with_seed(VideoRequest(**fields))
            job = self.check(request)
        except InvalidRequest as error:
            raise refused(error) from None
        return Order(request, job, said | _facts(job), priority)

    def _model(self, name: object) -> str:
        if not isinstance(name, str) or name not in self.names:
            raise invalid(
                f"model={shown(name)} is not served here: use {' or '.join(self.names)}.", "model", "model_not_found"
            )
        return name

    def _take_size(self, fields: dict[str, Any]) -> str | None:
        """Turn `size` into height and width, and fit these to the grid where that is wanted; what was asked for, where
        that is not what is made."""
        size = fields.pop("size", None)
        if size is not None:
            found = SIZE.fullmatch(size) if isinstance(size, str) else None
            if found is None:
                raise invalid(f"size={shown(size)} is not WIDTHxHEIGHT: give one such as 1280x704.", "size")
            for name, pixels in (("width", int(found[1])), ("height", int(found[2]))):
                if fields.setdefault(name, pixels) != pixels:
                    raise invalid(f"size={shown(size)} and {name}={shown(fields[name])} differ: give one.", name)
        sides: dict[str, Any] = {name: fields[name] for name in ("width", "height") if name in fields}
        if not isinstance(self.spec, GriddedFamily) or not all(type(side) is int for side in sides.values()):
            return None
        grid: dict[str, int] = dict(zip(("height", "width"), self.spec.grid, strict=True))
        fitted = {name: max(1, round(side / grid[name])) * grid[name] for name, side in sides.items()}
        if fitted == sides:
            return None
        if self.fit_sizes:
            fields.update(fitted)
            return _shown_size(sides)
        if size is None:
            return None  # the model names the nearest of a side
        raise invalid(
            f"size={shown(size)} is not on the model's grid of {grid['width']}x{grid['height']}: the nearest is "
            f"{fitted['width']}x{fitted['height']}.",
            "size",
        )

    def _take_seconds(self, fields: dict[str, Any], seconds: object) -> None:
        """Turn `seconds` into frames: so many times the rate, and one."""
        length = _number_of_seconds(seconds)
        rate = self.check(VideoRequest(**{name: value for name, value in fields.items() if name != "num_frames"})).fps
        step = self.spec.vae_frames if isinstance(self.spec, GriddedFamily) else 1
        frames, below = length * rate, math.floor(length * rate / step + NEAR) * step
        if abs(frames - below) > NEAR * max(1.0, frames):
            raise invalid(
                f"seconds={shown(seconds)} at {rate} frames a second is {frames + 1:g} frames, and the model makes "
                f"{step}k+1: use {below / rate:g} or {(below + step) / rate:g} seconds."
                if step > 1
                else f"seconds={shown(seconds)} at {rate} frames a second is no whole number of frames: use "
                f"{below / rate:g} or {(below + 1) / rate:g} seconds.",
                "seconds",
            )
        if fields.setdefault("num_frames", below + 1) != below + 1:
            raise invalid(
                f"seconds={shown(seconds)} is num_frames={below + 1} at {rate} frames a second, and num_frames="
                f"{shown(fields['num_frames'])} is given, too: give one.",
                "seconds",
            )


def _check_known(fields: Mapping[str, Any]) -> None:
    for name in fields:
        if name not in KNOWN:
            near = difflib.get_close_matches(name[:100], KNOWN, 1, 0.0)[0]
            raise invalid(
                f"Unknown field {shown(name)}: the nearest known one is {shown(near)}.", name[:100], "unknown_field"
            )


def _check_text(name: str, value: object) -> None:
    """What can be kept and read again: no half of a character, no zero, not too long."""
    if isinstance(value, list) and len(value) > LIST_LIMIT:
        raise invalid(f"{name} has {len(value)} items: use {LIST_LIMIT} at most.", name)
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            continue
        if len(text) > TEXT_LIMIT:
            raise invalid(f"{name}={shown(text)} has {len(text)} characters: use {TEXT_LIMIT} at most.", name)
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise invalid(
                f"{name} has a character that is none (a zero or half of a surrogate pair): leave it out.", name
            )


def _priority(given: object, highest: str) -> str:
    order = list(get_args(Priority))
    if given is None:
        return min("normal", highest, key=order.index)
    if not isinstance(given, str) or given not in WEIGHTS:
        raise invalid(f"priority={shown(given)} is not known: use {', '.join(order)}.", "priority")
    if order.index(given) > order.index(highest):
        raise Refusal(
            403, f"priority={shown(given)} is more than your key may have: use {highest}.", "priority", "priority"
        )
    return given


def _user(given: object) -> str | None:
    if given is not None and (not isinstance(given, str) or len(given) > USER_LIMIT):
        raise invalid(f"user={shown(given)} is no text of at most {USER_LIMIT} characters: shorten it.", "user")
    return given


def _number_of_seconds(given: object) -> float:
    if isinstance(given, str) and DECIMAL.fullmatch(given):
        given = float(given)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < 1e6:
        raise invalid(f"seconds={shown(given)} is no length: give a number, or a text such as '5'.", "seconds")
    return float(given)


def _shown_size(sides: Mapping[str, int]) -> str:
    return "x".join(str(sides.get(name, "")) for name in ("width", "height"))


def _facts(job: Job) -> dict[str, Any]:
    """What is said of the job as it will run."""
    return {
        "prompt": job.prompt,
        "size": f"{job.width}x{job.height}",
        "seconds": f"{(job.num_frames - 1) / job.fps:g}",
        "num_frames": job.num_frames,
        "fps": job.fps,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale,
        "seed": job.seed,
    }
