"""A Wan model's configs, and what follows from them alone (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from cineline.core.lora import Lora, LoraMode
from cineline.core.request import Job
from cineline.families.wan.job import WanJob

WanKind = Literal["ti2v", "t2v", "i2v"]


OPTIONS: Mapping[str, str] = {
    "transformer": "--transformer",
    "transformer_2": "--transformer-2",
    "vae": "--vae",
    "text_encoder": "--text-encoder-file",
}
"""Of the components."""


@dataclass(frozen=True)
class Component:
    """One of a model's parts: its config, and where its weights are.

    Attributes:
        name: transformer, transformer_2, text_encoder, image_encoder or vae.
        path: a folder as diffusers has it. variant: of its weights; None for the plain ones.
        is_given: instead, a file or a folder that the user has named, with names of tensors as they may be.
    """

    name: str
    config: Mapping[str, Any]
    path: Path
    variant: str | None = None
    is_given: bool = False


@dataclass(frozen=True)
class WanShapes:
    """A Wan 2.1 or 2.2 checkpoint's configs.

    Attributes:
        folder: holds `model_index.json` and a folder for each component; where there is none, the transformer's file.
        kind: ti2v (text, or text and image), t2v (text), i2v (text and image).
        transformer: config of the (high-noise) expert. Both experts have the same.
        experts: component names, high noise first.
        text, vae, scheduler: their configs; scheduler_class names a diffusers scheduler.
        image: config of the CLIP encoder that Wan 2.1's image-to-video models have; None where there is none.
        boundary_ratio: share of the training timesteps where the low-noise expert takes over, if any.
        variant: of the weights; None for the plain ones.
        files: by component, the file or folder that its weights come from instead.
        tokenizer: where it is: a folder, or a file of the text encoder that has it.
        loras: of its experts, each one's file, in their order.
        lora_mode: whether they are added to the weights or kept beside them.
        beside: of each expert, the numbers that are kept beside each block.
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
    variant: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    tokenizer: Path | None = None
    loras: tuple[Lora, ...] = ()
    lora_mode: LoraMode = "merge"
    image: Mapping[str, Any] | None = None
    beside: tuple[tuple[int, ...], ...] = ()

    def component(self, name: str) -> Component:
        """One of the model's parts that have weights."""
        others = {"vae": self.vae, "text_encoder": self.text, "image_encoder": self.image or {}}
        config = others.get(name, self.transformer)
        if name in self.files:
            return Component(name, config, self.files[name], is_given=True)
        return Component(name, config, self.folder / name, self.variant)

    @property
    def model_options(self) -> str:
        """What a command line calls the model."""
        alone = self.folder in self.files.values()
        words = [] if alone else [f"--model {quote(str(self.folder))}"]
        words += [f"{OPTIONS[name]} {quote(str(path))}" for name, path in self.files.items()]
        words += [f"--lora {quote(lora.text)}" for lora in self.loras]
        return " ".join([*words, *(["--lora-mode runtime"] if self.lora_mode == "runtime" else [])])

    @property
    def tokenizer_home(self) -> Path:
        """Where the tokenizer is."""
        return self.tokenizer or self.folder / "tokenizer"

    @property
    def pictures(self) -> int:
        """Images that the CLIP encoder sees: the first frame, or with a table of positions the first and the last."""
        if self.image is None:
            return 0
        return int(self.transformer["pos_embed_seq_len"] or self.picture_rows) // self.picture_rows

    @property
    def picture_rows(self) -> int:
        """Rows that the CLIP encoder makes of an image: one a patch, and one for the whole."""
        side = int(self.image["image_size"]) // int(self.image["patch_size"]) if self.image else 0
        return side * side + 1

    @property
    def image_rows(self) -> int:
        """Rows of images before those of a prompt, in what the cross attention sees."""
        return self.pictures * self.picture_rows

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
        shift, boundary = shift_of(self.scheduler), self.boundary_ratio or 0.0
        return 1 - boundary / (shift - (shift - 1) * boundary)

    def high_steps(self, job: Job) -> int:
        """Steps of a job that are the high-noise expert's: those before the switch, or whose noise level is at or above
        the boundary.

        With the levels that are given, else with even ones before the shift, as diffusers' flow schedulers have them:
        to 1 / 1000, which Euler and LCM have shifted once already.
        """
        assert isinstance(job, WanJob)  # `resolve` makes no others
        if job.switch_step is not None:
            return job.switch_step
        if job.boundary_ratio is None or len(self.experts) < 2:
            return job.steps
        is_flow_match = job.solver in ("euler", "lcm") if job.solver else self.scheduler_class.startswith("FlowMatch")
        shift = job.flow_shift or shift_of(self.scheduler)
        return _steps_above(job.boundary_ratio, shift, job.sigmas or job.steps, is_flow_match)


def shift_of(scheduler: Mapping[str, Any]) -> float:
    """A scheduler's flow shift; 1 where its config has none."""
    return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)


def _shifted(level: float, shift: float) -> float:
    return shift * level / (1 + (shift - 1) * level)


@cache
def _steps_above(boundary: float, shift: float, levels: tuple[float, ...] | int, is_flow_match: bool) -> int:
    """Of these noise levels before the shift, or of so many even ones, those at or above the boundary.

    Args:
        is_flow_match: even ones are those of diffusers' FlowMatch classes: the last is the lowest level, shifted. The
            other classes have that behind their last.
    """
    if isinstance(levels, int):
        lowest, gaps = (_shifted(0.001, shift), max(1, levels - 1)) if is_flow_match else (0.001, levels)
        levels = tuple(1 - (1 - lowest) * step / gaps for step in range(levels))
    return sum(_shifted(level, shift) >= boundary for level in levels)
