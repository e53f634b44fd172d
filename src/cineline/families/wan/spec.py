"""The Wan 2.2 models as data: shapes from a checkpoint's config files, default requests, rules (no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import Image

from cineline.core.config import Cut, DeviceConfig, Dtype, ParallelConfig
from cineline.core.hardware import Device, Link
from cineline.core.image import load_image
from cineline.core.request import Job, VideoRequest
from cineline.errors import CheckpointError, InvalidConfig, InvalidRequest
from cineline.families.wan.costs.line import PlannedLine
from cineline.families.wan.costs.model import ModelCosts
from cineline.families.wan.job import WanJob
from cineline.planning.cut import default_cut

WanKind = Literal["ti2v", "t2v", "i2v"]

Defaults = Mapping[str, float]

WAN_DEFAULTS: Mapping[WanKind, Defaults] = {
    "ti2v": {
        "height": 704,
        "width": 1280,
        "num_frames": 121,
        "fps": 24,
        "num_inference_steps": 50,
        "guidance_scale": 5.0,
    },
    "t2v": {
        "height": 720,
        "width": 1280,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 40,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
    },
    "i2v": {
        "height": 720,
        "width": 1280,
        "num_frames": 81,
        "fps": 16,
        "num_inference_steps": 40,
        "guidance_scale": 3.5,
        "guidance_scale_2": 3.5,
    },
}
"""Official default requests of Wan 2.2 (github.com/Wan-Video/Wan2.2, wan/configs)."""

DEFAULTS_FILE = "cineline.json"

NO_DEFAULTS = ("prompt", "image", "decode")
"""Request fields that a checkpoint cannot have defaults for."""

MOST = {"num_inference_steps": 10_000, "fps": 1_000}
"""Largest values that are not taken for a slip of the hand."""

SOLVERS = (
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
)
"""diffusers' schedulers with one forward a step and no noise of their own, compared with diffusers bit for bit."""


@dataclass(frozen=True)
class WanSpec:
    """A Wan 2.2 checkpoint in diffusers format.

    Attributes:
        folder: holds `model_index.json` and a folder for each component.
        kind: ti2v (text, or text and image), t2v (text), i2v (text and image).
        transformer: config of the (high-noise) expert. Both experts have the same.
        experts: component names, high noise first.
        text, vae, scheduler: their configs; scheduler_class names a diffusers scheduler.
        boundary_ratio: share of the training timesteps where the low-noise expert takes over, if any.
        defaults: default request, the kind's row updated by the folder's `cineline.json`.
    """

    folder: Path
    kind: WanKind
    transformer: Mapping[str, Any]
    experts: tuple[str, ...]
    text: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    scheduler_class: str
    boundary_ratio: float | None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    stages_class: ClassVar[str] = "cineline.families.wan.stages:WanStages"

    @classmethod
    def open(cls, folder: Path) -> WanSpec:
        """Read the configs of a folder in diffusers format; no weights.

        Raises:
            CheckpointError: the folder is no Wan 2.2 checkpoint.
        """
        try:
            return cls._open(folder)
        except KeyError as error:
            raise CheckpointError(f"{folder}: a config file lacks {error}; download the checkpoint again.") from None

    @classmethod
    def _open(cls, folder: Path) -> WanSpec:
        index = _read_json(folder / "model_index.json", "a folder in diffusers format has it at its top")
        pipeline = index.get("_class_name")
        if pipeline not in ("WanPipeline", "WanImageToVideoPipeline"):
            raise CheckpointError(
                f"{folder} holds a {pipeline!r}: Cineline runs WanPipeline and WanImageToVideoPipeline checkpoints."
            )
        experts = tuple(name for name in ("transformer", "transformer_2") if _class_of(index, name))
        if not experts or experts[0] != "transformer":
            raise CheckpointError(f"{folder}/model_index.json names no 'transformer': use a whole checkpoint.")
        configs = [_read_json(folder / name / "config.json", "each component has one") for name in experts]
        vae = _read_json(folder / "vae" / "config.json", "each component has one")
        text = _read_json(folder / "text_encoder" / "config.json", "each component has one")
        kind = cls._kind(folder, index, configs[0], vae)
        shapes = [{key: value for key, value in config.items() if not key.startswith("_")} for config in configs]
        if any(shape != shapes[0] for shape in shapes):
            raise CheckpointError(f"The two experts of {folder} have different configs: Wan 2.2's are alike.")
        boundary = index.get("boundary_ratio")
        if boundary is not None and len(experts) == 1:
            raise CheckpointError(
                f"{folder}/model_index.json has boundary_ratio={boundary} but no 'transformer_2': "
                "add the second expert or remove the boundary."
            )
        scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", "each component has one")
        _check_solver(folder, _class_of(index, "scheduler"), scheduler)
        spec = cls(
            folder=folder,
            kind=kind,
            transformer=configs[0],
            experts=experts,
            text=text,
            vae=vae,
            scheduler=scheduler,
            scheduler_class=str(_class_of(index, "scheduler")),
            boundary_ratio=boundary,
            defaults={**WAN_DEFAULTS[kind], **_own_defaults(folder)},
        )
        assert spec.layers and spec.grid  # a config without their keys is refused here, not later
        return spec

    @staticmethod
    def _kind(
        folder: Path, index: Mapping[str, Any], transformer: Mapping[str, Any], vae: Mapping[str, Any]
    ) -> WanKind:
        if transformer.get("image_dim") is not None:
            raise CheckpointError(
                f"{folder} is an image-to-video model with an image encoder (Wan 2.1): use a Wan 2.2 checkpoint."
            )
        if index.get("expand_timesteps"):
            return "ti2v"
        channels, latent_channels = transformer["in_channels"], vae["z_dim"]
        if channels == latent_channels:
            return "t2v"
        if channels == 2 * latent_channels + vae.get("scale_factor_temporal", 4):
            return "i2v"
        raise CheckpointError(
            f"{folder}: a transformer with {channels} input channels does not fit a VAE with {latent_channels}: "
            "use the components of one checkpoint."
        )

    @property
    def layers(self) -> int:
        """Transformer blocks of an expert."""
        return int(self.transformer["num_layers"])

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of one token."""
        frames, rows, columns = self.transformer["patch_size"]
        return frames, rows, columns

    @property
    def vae_scale(self) -> int:
        """Pixels a side of one latent."""
        return int(self.vae.get("scale_factor_spatial", 8))

    @property
    def vae_frames(self) -> int:
        """Frames of one latent frame (the first one holds a single frame)."""
        return int(self.vae.get("scale_factor_temporal", 4))

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width must be multiples of these."""
        return self.vae_scale * self.patch[1], self.vae_scale * self.patch[2]

    def latent_shape(self, job: Job) -> tuple[int, int, int, int, int]:
        """Shape [1, C, F', H', W'] of a job's latents."""
        frames = (job.num_frames - 1) // self.vae_frames + 1
        return 1, int(self.vae["z_dim"]), frames, job.height // self.vae_scale, job.width // self.vae_scale

    @property
    def high_share(self) -> float:
        """Share of the steps that are the high-noise expert's, by the checkpoint's flow shift and boundary.

        A step at share u of the way has the noise level f u / (1 + (f - 1) u) with flow shift f (Esser et al. 2024,
        arXiv 2403.03206); those at or above the boundary are the high-noise expert's.
        """
        shift = float(self.scheduler.get("flow_shift") or self.scheduler.get("shift") or 1.0)
        boundary = self.boundary_ratio or 0.0
        return 1 - boundary / (shift - (shift - 1) * boundary)

    def high_steps(self, job: Job) -> int:
        """Steps of a job that are the high-noise expert's: those whose noise level is at or above the boundary.

        With even levels u from 1 to 1 / 1000 before the shift, as diffusers' flow schedulers have them.
        """
        assert isinstance(job, WanJob)  # `resolve` makes no others
        if job.boundary_ratio is None or len(self.experts) < 2:
            return job.steps
        shift = float(job.flow_shift or self.scheduler.get("flow_shift") or self.scheduler.get("shift") or 1.0)
        return _steps_above(job.boundary_ratio, shift, job.steps)

    def place(self, parallel: ParallelConfig) -> ParallelConfig:
        """See `FamilySpec.place`."""
        if parallel.expert_placement == "split" and len(self.experts) < 2:
            raise InvalidConfig(f"expert_placement='split' needs a model with two experts, {self.folder} has one.")
        heads = int(self.transformer["num_attention_heads"])
        shares = parallel.tp * parallel.ulysses
        if heads % shares:
            raise InvalidConfig(
                f"tp={parallel.tp} x ulysses={parallel.ulysses} does not divide the model's {heads} attention heads: "
                f"use a product among {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}."
            )
        width = int(self.transformer["ffn_dim"])
        if width % parallel.tp:
            raise InvalidConfig(f"tp={parallel.tp} does not divide the model's feed-forward width {width}: use less.")
        return parallel.placed(self.layers, self.high_share)

    def cut(self, parallel: ParallelConfig, config: DeviceConfig) -> tuple[Cut, ...]:
        """See `FamilySpec.cut`."""
        costs = self.costs(config.dtype, config.vae_dtype)
        filled = default_cut(costs, parallel)
        return filled.cut(self.layers, costs.text_layers, len(costs.decoder_bytes))

    def costs(self, dtype: Dtype, vae_dtype: Dtype) -> ModelCosts:
        """See `PlannedFamily.costs`."""
        return ModelCosts.of(self, dtype, vae_dtype)

    def line(
        self,
        parallel: ParallelConfig,
        devices: Sequence[Device],
        link: Link,
        job: Job,
        dtype: Dtype = "float32",
        vae_dtype: Dtype = "float32",
    ) -> PlannedLine:
        """See `PlannedFamily.line`."""
        return PlannedLine(self, self.costs(dtype, vae_dtype), parallel, tuple(devices), link, job)

    def example(self, fields: Mapping[str, int | float]) -> VideoRequest:
        """See `PlannedFamily.example`: an image of one pixel, the video's size being given."""
        if self.kind != "i2v":
            return VideoRequest(prompt="an example", **fields)
        sizes = {name: int(self.defaults[name]) for name in ("height", "width")}
        return VideoRequest(prompt="an example", image=Image.new("RGB", (1, 1)), **{**sizes, **fields})

    def resolve(self, request: VideoRequest, number: int) -> WanJob:
        """See `FamilySpec.resolve`."""
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
        if frames < 1 or frames % self.vae_frames != 1 % self.vae_frames:
            below = max(1, (frames - 1) // self.vae_frames * self.vae_frames + 1)
            raise InvalidRequest(
                f"num_frames={frames} is not {self.vae_frames}k+1: use {below} or {below + self.vae_frames}."
            )
        self._check_length("num_frames", frames, (frames - 1) // self.vae_frames + 1)
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
            chunks=(frames - 1) // self.vae_frames + 1 if request.decode else 0,
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
        return value if given else self.defaults.get(name, value)

    def _check_image(self, request: VideoRequest) -> None:
        if self.kind == "t2v" and request.image is not None:
            raise InvalidRequest(
                f"{self.folder} is a text-to-video model and takes no image: leave it out, or use a TI2V or I2V model."
            )
        if self.kind == "i2v" and request.image is None:
            raise InvalidRequest(f"{self.folder} is an image-to-video model and needs an image: give one.")

    def _size(self, request: VideoRequest) -> tuple[int, int]:
        if request.image is not None and request.height is None and request.width is None:
            return self._size_like(load_image(request.image))
        size = self._default(request, "height"), self._default(request, "width")
        for name, pixels, step, scale in zip(("height", "width"), size, self.grid, self.patch[1:], strict=True):
            if pixels < 1 or pixels % step:
                below = max(1, pixels // step) * step
                raise InvalidRequest(
                    f"{name}={pixels} is not a positive multiple of {step} (VAE {self.vae_scale} x patch {scale}): "
                    f"use {below} or {below + step}."
                )
            self._check_length(name, pixels, pixels // step)
        return size

    def _size_like(self, image: Image.Image) -> tuple[int, int]:
        """The image's aspect ratio at the default area, on the grid."""
        aspect = image.height / image.width
        area = self.defaults["height"] * self.defaults["width"]
        rows, columns = self.grid
        height = max(1, round(math.sqrt(area * aspect) / rows)) * rows
        width = max(1, round(math.sqrt(area / aspect) / columns)) * columns
        self._check_length("height", height, height // rows)
        self._check_length("width", width, width // columns)
        return height, width

    def _check_length(self, name: str, value: int, tokens: int) -> None:
        limit = int(self.transformer.get("rope_max_seq_len", 1024))
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
            return self.boundary_ratio
        if len(self.experts) == 1:
            raise InvalidRequest(
                f"boundary_ratio={boundary} needs a model with two experts, {self.folder} has one: leave it out."
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


@cache
def _steps_above(boundary: float, shift: float, steps: int) -> int:
    """Of so many steps, those whose noise level is at or above the boundary."""
    levels = [1 - 0.999 * step / steps for step in range(steps)]
    return sum(shift * u / (1 + (shift - 1) * u) >= boundary for u in levels)


def _class_of(index: Mapping[str, Any], name: str) -> str | None:
    """A component's class in a model index, None where there is none."""
    entry = index.get(name)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else None


def _check_solver(folder: Path, name: str | None, config: Mapping[str, Any]) -> None:
    noisy = config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type"))
    if name not in SOLVERS or noisy:
        kind = f"{name} with noise of its own" if noisy else name
        raise CheckpointError(f"{folder}: scheduler {kind} is not supported: use one of {', '.join(SOLVERS)}.")


def _read_json(path: Path, rule: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist ({rule}): check the model's path.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object: download it again.")
    return value


def _own_defaults(folder: Path) -> dict[str, Any]:
    path = folder / DEFAULTS_FILE
    if not path.exists():
        return {}
    own = _read_json(path, "it holds default request fields")
    try:
        checked = VideoRequest(**{"prompt": "checked"} | own)
    except InvalidRequest as error:
        raise CheckpointError(f"{path}: {error}") from None
    useless = [name for name in own if name in NO_DEFAULTS or own[name] is None]
    if useless:
        raise CheckpointError(f"{path}: {useless[0]!r} cannot have the default {own[useless[0]]!r}: remove it.")
    return checked.model_dump(include=set(own))
