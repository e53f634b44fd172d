"""What the served model takes, found out by asking its own rules, so that nobody has to know its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

from PIL import Image

from cineline.core.family import FamilySpec, GriddedFamily
from cineline.core.request import Job, VideoRequest
from cineline.engine.hub import MINIS, name_of
from cineline.errors import InvalidRequest
from cineline.server.fields import OFFERED
from cineline.server.schemas import ModelField, Takes

COMMON = ("height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale", "negative_prompt")
"""Fields that all models have."""

PROBES: Mapping[str, Any] = {
    "guidance_scale_2": 2.0,
    "flow_shift": 3.0,
    "boundary_ratio": 0.5,
    "switch_step": 1,
    "solver": "euler",
    "preset": "lightning",
    "cache": "mag",
    "preview": 1,
}
"""Further ones, each with a value that a model takes which has it."""

SIDE = 64
"""Pixels of the images that are asked with."""


def takes_of(spec: FamilySpec, defaults: Mapping[str, Any]) -> Takes:
    """What a model takes.

    Args:
        defaults: of requests, for fields that they leave out.
    """
    pictures: Sequence[Mapping[str, Any]] = ({}, {"image": _image()}, {"image": _image(), "last_image": _image()})
    found = [_resolved(spec, {**defaults, **each}) for each in pictures]
    job = next((each for each in found if each is not None), None)
    needed = pictures[0 if job is None else found.index(job)]
    grid, step = (spec.grid, spec.vae_frames) if isinstance(spec, GriddedFamily) else ((1, 1), 1)
    longer = {} if job is None else {"num_frames": job.num_frames + step}
    return Takes(
        defaults={} if job is None else {name: getattr(job, _of_job(name)) for name in COMMON},
        height_step=grid[0],
        width_step=grid[1],
        frames_step=step,
        length=_resolved(spec, {**defaults, **needed, **longer}) is not None,
        image=_whether(found[0] is None, found[1] is not None or found[2] is not None),
        last_image=_whether(found[0] is None and found[1] is None, found[2] is not None),
        fields=[_field(name, job) for name in PROBES if _uses(spec, name, {**defaults, **needed})],
        mini=name_of(spec) in MINIS,
    )


def _image() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE))


def _resolved(spec: FamilySpec, given: Mapping[str, Any]) -> Job | None:
    """A request with these fields as it would run; None where the model's rules refuse it."""
    try:
        return spec.resolve(VideoRequest(prompt="a cat", **given), 0)
    except InvalidRequest:
        return None


def _uses(spec: FamilySpec, name: str, given: Mapping[str, Any]) -> bool:
    """Whether the field changes what would run: a family may leave unread what it does not know."""
    with_it, without = _resolved(spec, {**given, name: PROBES[name]}), _resolved(spec, given)
    return with_it is not None and with_it != without


def _field(name: str, job: Job | None) -> ModelField:
    texts = [text for text in VideoRequest.model_fields[name].metadata if isinstance(text, str)]
    values = [dict(schema) for schema in OFFERED[name]]
    return ModelField(name=name, description=texts[0], values=values, default=getattr(job, name, None))


def _of_job(name: str) -> str:
    """What a job calls a field."""
    names = {"num_inference_steps": "steps"}
    assert names.get(name, name) in {each.name for each in fields(Job)}
    return names.get(name, name)


def _whether(must: bool, may: bool) -> Literal["no", "may", "must"]:
    if not may:
        return "no"
    return "must" if must else "may"
