"""What the service answers, and what it takes, for its OpenAPI document and for whoever reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cineline.core.request import MOST_SEED, VideoRequest
from cineline.server.fields import OFFERED
from cineline.server.orders import PICTURES, REFERENCE, TEXT_LIMIT, USER_LIMIT, Priority


class Problem(BaseModel):
    """What is wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer of 4xx and 5xx."""

    error: Problem


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class VideoObject(BaseModel):
    """A job. OpenAI's fields, then Cineline's.

    Attributes, beyond OpenAI's:
        phase: what it is at. step, decoded: solver steps and decode chunks done; of how many.
        restarts: how often the ranks were started anew under it.
        requested_size: what was asked for, where --fit-sizes took another.
        inference_time_s: from its start to its file.
    """

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    seconds: str
    size: str
    prompt: str
    remixed_from_video_id: None = None
    error: JobError | None = None
    phase: Literal["waiting", "encoding", "denoising", "decoding", "done"]
    step: int
    num_inference_steps: int
    decoded: int
    chunks: int | None = None
    restarts: int
    num_frames: int
    fps: int
    guidance_scale: float
    seed: int
    priority: Priority
    user: str | None = None
    requested_size: str | None = None
    inference_time_s: float | None = None


class VideoPage(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A job that is gone."""

    id: str
    deleted: Literal[True] = True
    object: Literal["video.deleted"] = "video.deleted"


class VideoSettings(BaseModel):
    """What a job was made of, to be sent again.

    Attributes:
        fields: of its request, as `POST /v1/videos` takes them. images: the names of those that came along.
    """

    fields: dict[str, Any]
    images: list[str]


class ModelField(BaseModel):
    """A further field that the model uses.

    Attributes:
        values: JSON schemas, of which it has one. default: what holds where it is left out, where that is one value.
    """

    name: str
    description: str
    values: list[dict[str, Any]]
    default: Any = None


class Takes(BaseModel):
    """What the model takes.

    Attributes:
        defaults: of the fields that all models have.
        width_step, height_step, frames_step: what width, height, and frames behind the first one are multiples of.
        length: whether `num_frames` may be given.
        image, last_image: whether it takes one. fields: further ones that it uses.
        mini: it is a model that ships, which draws what a certain sentence says.
    """

    defaults: dict[str, Any]
    width_step: int
    height_step: int
    frames_step: int
    length: bool
    image: Literal["no", "may", "must"]
    last_image: Literal["no", "may", "must"]
    fields: list[ModelField]
    mini: bool


class Model(BaseModel):
    """A name that the model goes by, with what it takes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["cineline"] = "cineline"
    takes: Takes


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Of the process (`/health`), or of its readiness for jobs (`/ready`)."""

    status: Literal["ok"] = "ok"


LIMITS: Mapping[str, Mapping[str, Any]] = {
    "prompt": {"maxLength": TEXT_LIMIT, "description": "What the video shows; may be empty beside an image."},
    "negative_prompt": {"maxLength": TEXT_LIMIT},
    "seed": {"minimum": 0, "maximum": MOST_SEED},
    "num_videos": {"minimum": 1, "maximum": 1},
    "preview": {"minimum": 1},
    "height": {"minimum": 1},
    "width": {"minimum": 1},
    "num_frames": {"minimum": 1},
    "num_inference_steps": {"minimum": 1},
    "fps": {"minimum": 1},
    "flow_shift": {"exclusiveMinimum": 0},
    "boundary_ratio": {"minimum": 0, "maximum": 1},
    "switch_step": {"minimum": 0},
    "sigmas": {"minItems": 1},
    "timeout_s": {"exclusiveMinimum": 0},
}
"""Of fields, whatever the model; it has further rules."""


def _described(name: str) -> dict[str, Any]:
    """A field's schema with what the command line's help says of it."""
    texts = [text for text in VideoRequest.model_fields[name].metadata if isinstance(text, str)]
    several = OFFERED[name]
    schema = several[0] if len(several) == 1 else {"anyOf": several}
    return {**schema, **({"description": texts[0]} if texts else {}), **LIMITS.get(name, {})}


def create_schema(is_form: bool) -> dict[str, Any]:
    """What `POST /v1/videos` takes, as JSON or as a form; with what the model says to it."""
    picture: dict[str, Any] = {
        "description": "A data URL, or {'image_url': a data URL}. A PNG, JPEG or WebP.",
        "anyOf": [
            {"type": "string"},
            {"type": "object", "properties": {"image_url": {"type": "string"}}, "required": ["image_url"]},
        ],
    }
    if is_form:
        picture = {"description": "A PNG, JPEG or WebP file, or a data URL.", "type": "string"}
    properties = {name: _described(name) for name in OFFERED}
    properties |= {
        "model": {"type": "string", "description": "The served model's name, or one of its aliases."},
        "seconds": {
            "description": "Length: num_frames = seconds x fps + 1.",
            **({"type": "string"} if is_form else {"type": ["string", "number"]}),
        },
        "size": {"type": "string", "pattern": "^[0-9]{1,5}x[0-9]{1,5}$", "description": "WIDTHxHEIGHT."},
        "priority": {"enum": ["low", "normal", "high"], "description": "Its share of the line."},
        "user": {"type": "string", "maxLength": USER_LIMIT, "description": "Repeated in answers."},
        REFERENCE: {**picture, "description": f"The first frame. {picture['description']}"},
        "last_image": {**picture, "description": f"The last frame. {picture['description']}"},
    }
    firsts = {"image": REFERENCE, "last_image": "last_image"}
    properties |= {
        name: {**picture, "description": f"A second name of {firsts[image]}."}
        for name, image in PICTURES.items()
        if name not in properties
    }
    return {"type": "object", "properties": properties, "required": ["prompt"], "additionalProperties": False}


CREATE_BODY: Mapping[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": create_schema(False)},
            "multipart/form-data": {"schema": create_schema(True)},
        },
    }
}
"""For the document's operations that take one."""
