"""HunyuanVideo 1.5 as data: a checkpoint's configs, default requests, rules (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cineline.core.config import Dtype, ParallelConfig
from cineline.core.request import Job, VideoRequest
from cineline.errors import CheckpointError, InvalidRequest, shown
from cineline.families.checkpoint import Checkpoint, check_plain, own_defaults, read_configs
from cineline.families.fields import Fields
from cineline.families.hunyuan_video.costs import HunyuanCosts, HunyuanLine
from cineline.families.placing import heads_alone

CLASSES = {
    "transformer": "HunyuanVideo15Transformer3DModel",
    "text_encoder": "Qwen2_5_VLTextModel",
    "text_encoder_2": "T5EncoderModel",
    "vae": "AutoencoderKLHunyuanVideo15",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "guider": "ClassifierFreeGuidance",
}

DEFAULTS: Mapping[str, Any] = {
    "num_frames": 121,
    "num_inference_steps": 50,
    "guidance_scale": 6.0,
    "fps": 24,
}
"""The repository's (github.com/Tencent-Hunyuan/HunyuanVideo-1.5)."""

SIZES: Mapping[int, tuple[int, int]] = {640: (480, 848), 960: (720, 1280)}
"""Height and width by the transformer's `target_size`, as diffusers' pipeline has them (16:9)."""

UNSUPPORTED = {"use_meanflow": "a super-resolution model's"}
GUIDER = {
    "guidance_rescale": "a rescaled guidance",
    "use_original_formulation": "another formulation of guidance",
    "start": "guidance that begins later",
}
SCHEDULER = {"use_dynamic_shifting": "a shift that follows the size"}


MOST_FPS, MOST_FRAMES, MOST_CELLS = 1_000, 1_024, 1_024
"""Frames a second; latent frames, and latents a side: more are taken for a slip of the hand."""


@dataclass(frozen=True, kw_only=True)
class HunyuanJob(Job):
    """A `Job` with the steps' levels.

    Attributes:
        flow_shift: instead of the checkpoint's. sigmas: noise levels before that; None for even ones.
    """

    flow_shift: float | None = None
    sigmas: tuple[float, ...] | None = None


@dataclass(frozen=True)
class HunyuanVideoSpec(Checkpoint):
    """A HunyuanVideo 1.5 checkpoint that makes videos of text, in diffusers format: what `FamilySpec` and
    `PlannedFamily` ask for."""

    stages_class: ClassVar[str] = "cineline.families.hunyuan_video.stages:HunyuanVideoStages"
    line_class = HunyuanLine

    @classmethod
    def open(cls, folder: Path, variant: str | None = None) -> HunyuanVideoSpec:
        """Read the configs of a folder in diffusers format; no weights.

        Raises:
            CheckpointError: the folder is no HunyuanVideo 1.5 checkpoint, or one of a kind that is not run.
        """
        configs = read_configs(folder, CLASSES)
        check_plain(folder, configs["transformer"], UNSUPPORTED)
        check_plain(folder, configs["guider"], GUIDER)
        check_plain(folder, configs["scheduler"], SCHEDULER)
        if configs["guider"].get("stop", 1.0) != 1.0 or not configs["guider"].get("enabled", True):
            raise CheckpointError(
                f"{shown(folder)}: its guider guides only some steps, or none, which is not run here: set stop to 1 "
                "and enabled to true, and give --guidance-scale 1 for no guidance."
            )
        scale = configs["guider"].get("guidance_scale", DEFAULTS["guidance_scale"])
        defaults = {**DEFAULTS, **size_of(configs["transformer"]), "guidance_scale": scale, **own_defaults(folder)}
        return cls(folder, configs, defaults, variant)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        own = self.configs["transformer"]
        side = int(own.get("patch_size", 1))
        return int(own.get("patch_size_t", 1)), side, side

    @property
    def vae_scale(self) -> int:
        """Pixels a side of one latent."""
        return int(self.configs["vae"].get("spatial_compression_ratio", 16))

    @property
    def vae_frames(self) -> int:
        """Frames of one latent frame (the first one holds a single frame)."""
        return int(self.configs["vae"].get("temporal_compression_ratio", 4))

    def latent_shape(self, job: Job) -> tuple[int, int, int, int, int]:
        """Shape [1, C, F', H', W'] of a job's latents."""
        channels, frames = int(self.configs["vae"].get("latent_channels", 32)), (job.num_frames - 1) // self.vae_frames
        return 1, channels, frames + 1, job.height // self.vae_scale, job.width // self.vae_scale

    def tokens(self, job: Job) -> int:
        """S."""
        return math.prod(self.latent_shape(job)[2:]) // math.prod(self.patch)

    def place(self, parallel: ParallelConfig) -> ParallelConfig:
        """See `FamilySpec.place`."""
        return heads_alone(parallel, int(self.configs["transformer"].get("num_attention_heads", 16)))

    def costs(self, dtype: Dtype, vae_dtype: Dtype) -> HunyuanCosts:
        """See `PlannedFamily.costs`."""
        return HunyuanCosts.of(self.configs, dtype, vae_dtype)

    def resolve(self, request: VideoRequest, number: int) -> HunyuanJob:
        """See `FamilySpec.resolve`. Guidance is off where its scale is 1, as in diffusers' `ClassifierFreeGuidance`."""
        fields = Fields(request, self.defaults, self.folder, known=("num_frames", "flow_shift"))
        frames, step = fields.whole("num_frames", MOST_FRAMES * self.vae_frames), self.vae_frames
        if frames % step != 1 % step:
            below = (frames - 1) // step * step + 1
            raise InvalidRequest(f"num_frames={shown(frames)} is not {step}k+1: use {below} or {below + step}.")
        if (frames - 1) // step + 1 > MOST_FRAMES:
            raise InvalidRequest(f"num_frames={shown(frames)} is above {(MOST_FRAMES - 1) * step + 1}: use less.")
        scale, shift = fields.scale(), fields.value("flow_shift")
        if shift is not None and not (math.isfinite(shift) and shift > 0):
            raise InvalidRequest(f"flow_shift={shown(shift)} is not a positive number: use 1 to 20.")
        branches, grid = (1 if math.isclose(scale, 1.0) else 2), self.vae_scale * self.patch[1]
        return HunyuanJob(
            id=number,
            prompt=request.prompt,
            negative_prompt=fields.value("negative_prompt"),
            height=fields.side("height", grid, MOST_CELLS),
            width=fields.side("width", grid, MOST_CELLS),
            num_frames=frames,
            steps=fields.steps(),
            sigmas=fields.sigmas(),
            flow_shift=shift,
            branches=branches,
            texts=branches,
            chunks=int(request.decode),
            guidance_scale=scale,
            seed=fields.seed(),
            fps=fields.whole("fps", MOST_FPS),
            has_image=False,
        )


def size_of(transformer: Mapping[str, Any]) -> dict[str, int]:
    """A model's own size; that of the smaller models, where its config says another one."""
    height, width = SIZES.get(transformer.get("target_size", 640), SIZES[640])
    return {"height": height, "width": width}
