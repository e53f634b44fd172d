"""The nouns: what a user asks for, what the line carries."""

from __future__ import annotations

import enum
import math
import random
import struct
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StrictBool,
    ValidationError,
    model_validator,
)

from cineline.core.image import Fit
from cineline.errors import InvalidRequest, shown


def _number(value: Any) -> Any:
    """Numbers as they are, numpy's too; nothing is read into a text or a truth value."""
    if isinstance(value, (str, bytes, bool)):
        raise ValueError("it is no number")
    return value


def _seconds(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError("it is no finite number above 0: give seconds, or leave it out")
    return value


def _row(value: Any) -> Any:
    """A text's numbers, which commas separate; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return tuple(map(float, value.split(",")))
    except ValueError:
        raise ValueError("it is no row of numbers: give one such as 1,0.75,0.5,0.25") from None


def _seed(value: Any) -> Any:
    if isinstance(value, str) and value != RANDOM:
        raise ValueError(f"it is no whole number: give one, or {RANDOM}")
    return value if isinstance(value, str) else _number(value)


def _cache(value: str | None) -> str | None:
    """With its threshold."""
    if value is None:
        return None
    name, colon, threshold = value.partition(":")
    try:
        above = float(threshold) if colon else CACHE_THRESHOLD
    except ValueError:
        above = 0.0
    if name != "mag" or not 0 < above < math.inf:
        raise ValueError(f"it is no cache: give mag, or mag:T with a threshold above 0 such as {CACHE_THRESHOLD}")
    return f"{name}:{above!r}"


def _count(value: int) -> int:
    if not 1 <= value <= MOST_VIDEOS:
        raise ValueError(f"it is not from 1 to {MOST_VIDEOS}: give so many, or a line for each")
    return value


def _steps(value: int | None) -> int | None:
    if value is not None and not 1 <= value <= MOST_STEPS:
        raise ValueError(f"it is not from 1 to {MOST_STEPS}: give so many, or leave it out")
    return value


RANDOM: Literal["random"] = "random"

CACHE_THRESHOLD = 0.06
"""Of MagCache, as in diffusers."""

MOST_SEED = 2**64 - 1
"""What torch's generators take."""

DRAWN_BELOW = 2**32
"""Of seeds that are drawn: whatever reads JSON keeps them exact, and a person can copy them."""

IMAGES = ("image", "last_image")
"""Fields of a request that hold one."""

MOST_VIDEOS = 10_000
"""Of a request."""

MOST_STEPS = 10_000
"""More are taken for a slip of the hand."""

Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number)]
Reals = Annotated[tuple[Real, ...], BeforeValidator(_row)]
Seed = Annotated[int | Literal["random"], BeforeValidator(_seed)]

Solver = Literal["unipc", "euler", "dpm++", "lcm"]
Preset = Literal["lightning"]


class VideoRequest(BaseModel):
    """One video to generate. A field left out (None) takes the model's default.

    Attributes, beyond what the options' texts say:
        prompt: what the video shows; may be empty beside an image.
        negative_prompt: used only with guidance on.
        image: a file's path or a PIL image.
        height, width: the grid is VAE scale x patch. With an image, one left out is the other in the image's shape, to
            the nearest multiple of the grid; with both left out, the default area has that shape.
        guidance_scale: 1 or less is no guidance, by either expert (as in diffusers).
        guidance_scale_2: only for models with two experts. Left out, it is `guidance_scale` where that is given (as in
            diffusers), else the kind's own (T2V-A14B 3, I2V-A14B 3.5).
        boundary_ratio: share of the training timesteps below which that expert runs.
        switch_step: number of the first step that it makes, in place of the ratio: 0 to all steps.
        solver: left out, the checkpoint's own. "lcm" adds noise at each step, which `seed` and the step name.
        sigmas: falling, from 1 at most to above 0, one a step; `flow_shift` comes on top of them. A text such as
            "1,0.75,0.5,0.25" is read as one.
        preset: fills in fields that are left out. "lightning" is for models, or LoRAs, of four steps: even sigmas,
            Euler, flow shift 5, no guidance, the second expert from the middle on.
        skip_guidance_at_one: where an expert's guidance scale is exactly 1, its steps have no second forward.
            Diffusers computes it, and rounding then gives other bits.
        seed: of the CPU generator that draws it, 0 <= seed < 2**64; "random" is drawn when the request is submitted.
        decode: False stops at the latents.
        loras: of an engine with lora_mode="runtime" those that it is to have, each as NAME or NAME@SCALE (times the
            engine's own scale). Left out, all of them.
        timeout_s: checked twice a second; whoever is late is cancelled, and its handle raises `RequestTimedOut`.
        last_image: as `image`, beside it.
        preview: see `RequestHandle.take_previews`.
        fit: see `core.image.fitted`.
        cache: lossy: steps that change little are not computed. "mag" is MagCache (Ma et al. 2025, arXiv 2506.09045),
            for 20 steps and more; "mag:0.12" has another threshold, the error that may add up from one computed step to
            the next.
        num_videos: each is a request of its own (`Engine.submit_all`), with the seeds from `seed` on.

    Raises:
        InvalidRequest: an unknown field or a value of the wrong type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    prompt: str
    negative_prompt: Annotated[str, "What it should not show"] = ""
    image: Annotated[Path | Image.Image | None, "First frame, for models that take one"] = None
    height: Annotated[Whole | None, "Pixels, on the model's grid"] = None
    width: Annotated[Whole | None, "Pixels, on the model's grid"] = None
    num_frames: Annotated[Whole | None, "4k+1"] = None
    num_inference_steps: Annotated[Whole | None, "Solver steps"] = None
    guidance_scale: Annotated[Real | None, "Classifier-free guidance, on above 1"] = None
    guidance_scale_2: Annotated[Real | None, "The low-noise expert's; as the first's where that is given"] = None
    flow_shift: Annotated[Real | None, "The solver's time shift"] = None
    boundary_ratio: Annotated[Real | None, "Where the low-noise expert takes over"] = None
    switch_step: Annotated[Whole | None, "The same, as the number of its first step"] = None
    solver: Annotated[Solver | None, "unipc, euler, dpm++ or lcm, the checkpoint's own if left out"] = None
    sigmas: Annotated[Reals | None, "Noise levels of the steps before the shift, such as 1,0.75,0.5,0.25"] = None
    preset: Annotated[Preset | None, "lightning: 4 steps, Euler, shift 5, guidance 1, switch at 2, where left out"] = (
        None
    )
    skip_guidance_at_one: Annotated[StrictBool, "No second forward where an expert's guidance is exactly 1"] = False
    seed: Annotated[Seed, "Of the noise, below 2**64, or random"] = 0
    fps: Annotated[Whole | None, "Frames a second of the file"] = None
    decode: StrictBool = True
    loras: tuple[str, ...] | None = None
    timeout_s: Annotated[Real | None, AfterValidator(_seconds), "Seconds from submission in which it must be done"] = (
        None
    )
    num_videos: Annotated[Whole, AfterValidator(_count), "Videos, with seeds counted up"] = 1
    last_image: Annotated[Path | Image.Image | None, "Last frame, for I2V models, beside the first one"] = None
    preview: Annotated[
        Whole | None, AfterValidator(_steps), "Solver steps from one small picture of what is coming to the next; none"
    ] = None
    cache: Annotated[
        str | None, AfterValidator(_cache), "Lossy: mag skips steps that change little, mag:T with threshold T; none"
    ] = None
    fit: Annotated[Fit, "Of an image in another shape than the video: stretch, crop or pad"] = "stretch"

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InvalidRequest(_first_sentence(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _none_is_left_out(cls, given: Any) -> Any:
        """Also of the fields that have another default."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


def drawn(seed: int | Literal["random"]) -> int:
    """The seed, drawn by the operating system where it is to be random."""
    return random.SystemRandom().randrange(DRAWN_BELOW) if seed == RANDOM else seed


def with_seed(request: VideoRequest) -> VideoRequest:
    """The request, a random seed drawn: from here on it gives the same bits however often it runs."""
    return request.model_copy(update={"seed": drawn(RANDOM)}) if request.seed == RANDOM else request


def videos_of(request: VideoRequest, seed: int) -> list[VideoRequest]:
    """A request for each of its videos, with seeds from `seed` on."""
    return [request.model_copy(update={"seed": seed + number, "num_videos": 1}) for number in range(request.num_videos)]


def _first_sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "extra_forbidden":
        known = ", ".join(VideoRequest.model_fields)
        return f"Unknown request field {shown(field)}: the fields are {known}."
    if first["type"] == "missing":
        return f"The request has no {shown(field)}: give one."
    if first["type"] == "literal_error":
        return f"{field}={shown(first['input'])} is not known: use {first['ctx']['expected']}."
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[0].lower() + reason[1:]
    remedy = "" if ": give" in reason else "; give a value of that type"
    return f"{field}={shown(first['input'])} cannot be used: {reason}{remedy}."


class Shape(NamedTuple):
    """What the line must know of a job: jobs alike in this follow the same scripts.

    Attributes:
        steps, branches, chunks, first_step, unguided, skipped: `Job`'s.
        texts: branches whose prompts go through the stages.
    """

    steps: int
    branches: int
    texts: tuple[int, ...]
    chunks: int
    first_step: int = 0
    unguided: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()

    def goes_on(self, step: int) -> bool:
        """Whether the next step is skipped, so that what this one made is kept for it."""
        return step + 1 in self.skipped


PromptKey = tuple[int, str]
"""A line's number, and a prompt."""


class Remembered(NamedTuple):
    """Prompts whose embeddings the heads keep.

    Attributes:
        found: branches whose embedding is there, so that nothing of it goes through the stages.
        gone: those that are forgotten when this job is admitted.
    """

    found: tuple[int, ...] = ()
    gone: tuple[PromptKey, ...] = ()


@dataclass(frozen=True)
class Job:
    """A request with nothing left open: what every stage is told at admission. A family may subclass it, with settings
    of its own.

    Attributes:
        id: unique in its engine.
        steps: solver steps. branches: forwards a step, 2 with guidance and 1 without.
        texts: prompts that go through the stages' text encoder, one a branch; 0 where the family has none.
        chunks: decode items, one a latent frame; 0 when the request stops at the latents.
        has_image: whether the head is handed a first frame.
        first_step: where it begins, 0 <= first_step < steps; above 0 with a snapshot of so many steps.
        first_expert: of that step, as the snapshot says.
        unguided: experts whose steps have the first branch alone, where the others have two.
        skipped: steps that are not computed: the end of the line adds what it kept of the last one that was, by the
            same expert. Never the first one. The engine's may be an estimate, by which it orders the stream; the ranks'
            are what is done.
        preview: steps from one preview to the next; None for none.
        prompts: what is kept of prompts' embeddings; None where none are. As the scheduler settles it.
        The other fields are `VideoRequest`'s, resolved.
    """

    id: int
    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    steps: int
    branches: int
    texts: int
    chunks: int
    guidance_scale: float
    seed: int
    fps: int
    has_image: bool
    first_step: int = field(default=0, kw_only=True)
    first_expert: int = field(default=0, kw_only=True)
    unguided: tuple[int, ...] = field(default=(), kw_only=True)
    skipped: tuple[int, ...] = field(default=(), kw_only=True)
    preview: int | None = field(default=None, kw_only=True)
    prompts: Remembered | None = field(default=None, kw_only=True)

    @property
    def shape(self) -> Shape:
        found = () if self.prompts is None else self.prompts.found
        texts = tuple(branch for branch in range(self.branches) if branch not in found) if self.texts else ()
        return Shape(self.steps, self.branches, texts, self.chunks, self.first_step, self.unguided, self.skipped)

    def ends_denoising(self, item: WorkItem) -> bool:
        """Whether the item belongs to the last step."""
        return item.kind is Kind.DENOISE and item.number + 1 == self.steps

    def previews(self, item: WorkItem) -> bool:
        """Whether a picture is to be made of what the item's step has come to; of the last one there are frames."""
        due = item.kind is Kind.DENOISE and self.preview is not None and (item.number + 1) % self.preview == 0
        return due and not self.ends_denoising(item)

    @property
    def own_settings(self) -> dict[str, str]:
        """The family's own as options' texts, without those that the model does not use."""
        common = {each.name for each in fields(Job)}
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in common}
        return {name: _text(value) for name, value in own.items() if value is not None}


def _text(value: Any) -> str:
    """A setting's, as an option takes it."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    if isinstance(value, str):
        return value
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


class Kind(enum.IntEnum):
    """What a work item does.

    TEXT: a prompt through the text encoder's slices, its embedding from the tail back to the head. ENCODE: the head
    makes a request's conditioning and hands it to all stages. DENOISE: a forward of one branch of one step. DECODE:
    a chunk of latents through the VAE decoder's slices to frames. DROP: every stage forgets the request.
    """

    TEXT = 0
    ENCODE = 1
    DENOISE = 2
    DECODE = 3
    DROP = 4


class Branch(enum.IntEnum):
    """The two forwards of classifier-free guidance, in the order they run."""

    COND = 0
    UNCOND = 1


class WorkItem(NamedTuple):
    """One forward through the stages.

    Attributes:
        kind: what to do.
        request: the job's id.
        number: the solver step (DENOISE), the chunk (DECODE), or its group's (TEXT).
        branch: of a TEXT or DENOISE item.
    """

    kind: Kind
    request: int
    number: int = 0
    branch: Branch = Branch.COND


class Value(enum.Enum):
    """What travels.

    TEXT, CONDITIONING, HIDDEN, CHUNK: what a stage hands to the next one with a TEXT, ENCODE, DENOISE or DECODE item.
    EMBEDDING: a prompt's, behind the text encoder. PREDICTION: of the second branch's line. LATENTS: after a solver
    step. HISTORY: latents and what the solver keeps, to where another rank goes on with them.
    """

    TEXT = "text"
    EMBEDDING = "embedding"
    CONDITIONING = "conditioning"
    HIDDEN = "hidden"
    PREDICTION = "prediction"
    LATENTS = "latents"
    HISTORY = "history"
    CHUNK = "chunk"

    @property
    def stays(self) -> bool:
        """Whether a request keeps it to its end, in a buffer of its own."""
        return self is Value.CONDITIONING


class Group(NamedTuple):
    """Items that are emitted together: one entry of the ordered stream that all stages execute.

    The engine hears of a group's beginning and of its end, not of each item.

    Attributes:
        kind, request, number: of all of its items; of TEXT the first branch, where one line runs them.
        size: how many there are in each line: the branches of a TEXT or DENOISE item that one line runs, else 1. Of a
            step that has the first branch alone it is as of the others: which those are, ranks know (`Rule.items`).
    """

    kind: Kind
    request: int
    number: int = 0
    size: int = 1

    def items(self, line: int) -> list[WorkItem]:
        """The items of a line, in order. With CFG parallelism each line runs its own branch."""
        if self.kind not in (Kind.TEXT, Kind.DENOISE):
            branches = [Branch.COND]
        else:
            alone = Branch(line + self.number) if self.kind is Kind.TEXT else Branch(line)
            branches = list(Branch) if self.size == len(Branch) else [alone]
        return [WorkItem(self.kind, self.request, self.number, branch) for branch in branches]

    def pack(self) -> bytes:
        """The group as a header of `HEADER.size` bytes."""
        return HEADER.pack(*self)

    @classmethod
    def unpack(cls, header: bytes) -> Group:
        """The group that `pack` wrote."""
        kind, request, number, size = HEADER.unpack(header)
        return cls(Kind(kind), request, number, size)


HEADER = struct.Struct("<BQIB")
"""Wire format of a group: kind, request, number, size."""
