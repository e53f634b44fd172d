"""Qwen-Image as data: a checkpoint's configs, default requests, rules (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from cineline.core.config import Dtype, ParallelConfig
from cineline.core.request import Branch, Job, VideoRequest
from cineline.errors import CheckpointError, InvalidRequest, reason, shown
from cineline.families.checkpoint import Checkpoint, check_plain, own_defaults, read_configs
from cineline.families.configs import read_json
from cineline.families.fields import Fields
from cineline.families.placing import heads_alone
from cineline.families.qwen_image.costs import QwenCosts, QwenLine
from cineline.families.qwen_image.prompts import DROPPED, LONGEST, MOST_TEXT, TEMPLATE

CLASSES = {
    "transformer": "QwenImageTransformer2DModel",
    "text_encoder": "Qwen2_5_VLForConditionalGeneration",
    "vae": "AutoencoderKLQwenImage",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}

DEFAULTS: Mapping[str, Any] = {
    "height": 1328,
    "width": 1328,
    "num_inference_steps": 50,
    "guidance_scale": 4.0,
    "negative_prompt": " ",
}
"""The model card's (huggingface.co/Qwen/Qwen-Image)."""

UNSUPPORTED = {
    "guidance_embeds": "a distilled model's guidance",
    "zero_cond_t": "an editing model's",
    "use_additional_t_cond": "a layered model's",
    "use_layer3d_rope": "a layered model's",
}


MOST_ROWS = 4096
"""Positions that the transformer's rope has, of which prompts take some behind the picture's."""


@dataclass(frozen=True, kw_only=True)
class QwenJob(Job):
    """A `Job` with what the shapes of a prompt follow from.

    Attributes:
        sigmas: noise levels of the steps; None for even ones.
        tokens: of each branch's prompt within its template.
    """

    sigmas: tuple[float, ...] | None = None
    tokens: tuple[tuple[int, ...], ...] = ()

    @property
    def own_settings(self) -> dict[str, str]:
        """See `Job.own_settings`; tokens are no setting."""
        return {name: value for name, value in super().own_settings.items() if name != "tokens"}

    def text_rows(self, branch: Branch) -> int:
        """Tokens of a prompt that the transformer sees: those behind the template's first ones, up to a limit."""
        return min(len(self.tokens[branch]) - DROPPED, MOST_TEXT)


@dataclass(frozen=True)
class QwenImageSpec(Checkpoint):
    """A Qwen-Image checkpoint in diffusers format: what `FamilySpec` and `PlannedFamily` ask for."""

    stages_class: ClassVar[str] = "cineline.families.qwen_image.stages:QwenImageStages"
    line_class = QwenLine

    @classmethod
    def open(cls, folder: Path, variant: str | None = None) -> QwenImageSpec:
        """Read the configs of a folder in diffusers format; no weights.

        Raises:
            CheckpointError: the folder is no Qwen-Image checkpoint, or one of a kind that is not run.
        """
        configs = read_configs(folder, CLASSES)
        check_plain(folder, configs["transformer"], UNSUPPORTED)
        read_json(folder / "tokenizer" / "tokenizer_config.json", "without a tokenizer no prompt is read")
        return cls(folder, configs, {**DEFAULTS, **own_defaults(folder)}, variant)

    @property
    def layers(self) -> int:
        """Blocks."""
        return int(self.configs["transformer"].get("num_layers", 60))

    @property
    def vae_scale(self) -> int:
        """Pixels a side of one latent."""
        return int(2 ** len(self.configs["vae"].get("temperal_downsample", (False, True, True))))

    def latent_shape(self, job: Job) -> tuple[int, int, int, int, int]:
        """Shape [1, C, 1, H', W'] of a job's latents."""
        channels = int(self.configs["transformer"].get("in_channels", 64)) // 4
        return 1, channels, 1, job.height // self.vae_scale, job.width // self.vae_scale

    def tokens(self, job: Job) -> int:
        """S: a token is two latents by two."""
        _, _, _, rows, columns = self.latent_shape(job)
        return rows * columns // 4

    def place(self, parallel: ParallelConfig) -> ParallelConfig:
        """See `FamilySpec.place`."""
        transformer = self.configs["transformer"]
        return heads_alone(parallel, int(transformer.get("num_attention_heads", 24)))

    def costs(self, dtype: Dtype, vae_dtype: Dtype) -> QwenCosts:
        """See `PlannedFamily.costs`."""
        return QwenCosts.of(self.configs, dtype, vae_dtype)

    def resolve(self, request: VideoRequest, number: int) -> QwenJob:
        """See `FamilySpec.resolve`. There is one frame, and guidance is true classifier-free guidance."""
        fields = Fields(request, self.defaults, self.folder, known=("num_frames",))
        if request.num_frames not in (None, 1):
            raise InvalidRequest(
                f"num_frames={shown(request.num_frames)} is not for {shown(self.folder)}, which makes pictures: leave "
                "it out."
            )
        step, scale = 2 * self.vae_scale, fields.scale()
        branches = 2 if scale > 1 else 1
        prompts = (request.prompt, fields.value("negative_prompt"))[:branches]
        return QwenJob(
            id=number,
            prompt=request.prompt,
            negative_prompt=fields.value("negative_prompt"),
            height=fields.side("height", step, MOST_ROWS),
            width=fields.side("width", step, MOST_ROWS),
            num_frames=1,
            steps=fields.steps(),
            sigmas=fields.sigmas(),
            branches=branches,
            texts=branches,
            chunks=int(request.decode),
            guidance_scale=scale,
            seed=fields.seed(),
            fps=1,
            has_image=False,
            tokens=tuple(self._tokens(prompt) for prompt in prompts),
        )

    def _tokens(self, prompt: str) -> tuple[int, ...]:
        """Of a prompt in its template; the most that there may be where there is no tokenizer, as in planning."""
        home = self.folder / "tokenizer"
        if not home.exists():
            return (0,) * LONGEST
        tokens = _tokenizer(home)(TEMPLATE.format(prompt), max_length=LONGEST, truncation=True).input_ids
        if len(tokens) <= DROPPED:
            raise CheckpointError(
                f"{shown(home)} makes {len(tokens)} tokens of a template of more than {DROPPED}: use the tokenizer "
                "that belongs to Qwen-Image."
            )
        return tuple(tokens)


@cache
def _tokenizer(home: Path) -> Any:
    from transformers import AutoTokenizer  # late: it loads torch, which opening a checkpoint need not wait for

    try:
        return AutoTokenizer.from_pretrained(home, local_files_only=True)
    except Exception as error:  # of files that are broken it raises anything
        raise CheckpointError(f"{shown(home)} cannot be loaded ({reason(error)}): download it again.") from None
