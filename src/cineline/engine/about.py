"""What a file says of itself: the request that made it and the model, as JSON; nothing of the machine (no torch)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from PIL import Image

from cineline.core.family import FamilySpec, StoredFamily
from cineline.core.request import IMAGES, Job, VideoRequest
from cineline.engine.blueprint import OPTION_OF, Blueprint
from cineline.engine.hub import public_name, public_path
from cineline.errors import CheckpointError
from cineline.families.identity import identity_of

log = logging.getLogger(__name__)

NOT_KEPT = (*IMAGES, "preset", "decode", "num_videos", "preview", "timeout_s")
"""Of a request: what changes no bits of one video whose other fields are filled in, and the images, of which a hash is
kept instead."""


class About:
    """Describes what a model's requests have made."""

    def __init__(self, blueprint: Blueprint) -> None:
        self._blueprint = blueprint
        self._model: Mapping[str, Any] | None = None

    def describer(self, request: VideoRequest, job: Job) -> Callable[[], str]:
        """Says it of a request whose images are loaded, which it lets go of."""
        images = {name: getattr(request, name) for name in IMAGES}
        hashes = {name: fingerprint(image) for name, image in images.items() if image is not None}
        return partial(self._of, line_of(request, job), hashes)

    def _of(self, line: Mapping[str, Any], images: Mapping[str, str]) -> str:
        """JSON, in ASCII: "cineline" (the version), "request" (a line for `--requests`, with nothing left open),
        "images" (size and SHA-256 of the pixels of each), "model" (see `_model`)."""
        from cineline import __version__

        if self._model is None:
            self._model = _model(self._blueprint)
        return json.dumps({"cineline": __version__, "request": line, "images": images, "model": self._model})


def line_of(request: VideoRequest, job: Job) -> dict[str, Any]:
    """The request as a line of `--requests`, with nothing left open but the images; in one order, so that files that
    are made again are the same bytes."""
    given = request.model_dump(exclude=set(NOT_KEPT), exclude_unset=True)
    names = [name for name in VideoRequest.model_fields if name not in NOT_KEPT and hasattr(job, name)]
    settled = {name: getattr(job, name) for name in names} | {"num_inference_steps": job.steps}
    if job.unguided:
        settled["skip_guidance_at_one"] = True
    if request.loras is not None:  # with their scales, which a job has elsewhere
        settled["loras"] = request.loras
    line = given | settled
    return {name: line[name] for name in VideoRequest.model_fields if line.get(name) is not None}


def fingerprint(image: Image.Image) -> str:
    """Size and SHA-256 of an RGB image's pixels."""
    return f"{image.width}x{image.height} {hashlib.sha256(image.tobytes()).hexdigest()}"


def _model(blueprint: Blueprint) -> Mapping[str, Any]:
    """Its public name if it has one, its identity, what else it was given, and the settings that bits depend on.

    Of files only the options are told ("vae"), of LoRAs their texts with FILE in place of a path, unless they are the
    hub's.
    """
    try:
        identity = identity_of(blueprint.spec)
    except CheckpointError as error:  # the files have gone since, and the video is worth more
        log.warning("%s The files that are made do not say which model made them.", error)
        identity = None
    return {"name": public_name(blueprint.spec), "identity": identity, **_given(blueprint.spec), **blueprint.bits}


def _given(spec: FamilySpec) -> Mapping[str, Any]:
    """What `Engine` takes beside the model, as far as there is something."""
    if not isinstance(spec, StoredFamily):
        return {}
    given: dict[str, Any] = {"variant": spec.variant, "files": [OPTION_OF.get(name, name) for name in spec.files]}
    if spec.loras:
        named = spec.lora_mode == "runtime"  # by which requests call them, and which are files' names if none is given
        given["loras"] = [lora.told(public_path(lora.path) or "FILE", named) for lora in spec.loras]
        given["lora_mode"] = spec.lora_mode
    return {name: value for name, value in given.items() if value}
