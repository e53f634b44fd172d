"""One Wan request on one stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from cineline.core.image import KeyFrames
from cineline.core.request import Branch, Kind, WorkItem
from cineline.families.pipeline_parallel import Hidden, RequestState
from cineline.families.prompts import Slot
from cineline.families.wan.denoise import Step
from cineline.families.wan.job import WanJob

FIRST_FRAME = "first_frame"


@dataclass
class WanState(RequestState):
    """One Wan request on one stage.

    Attributes:
        job: a Wan model's. image: the given frames, on the head alone and until it is encoded.
        steps: timestep, expert and guidance of every step.
        latent_shape: [1, C, F', H', W'].
        tokens: S.
        shards: this rank's share of them.
        keeps_first_frame: the first latent frame is given, not denoised (TI2V with an image).
        names: of the conditioning's tensors, in their order.
        rotary: cosines and sines of this rank's positions, float32 [1, s, 1, head dim] each.
        solver: on the tail, diffusers' scheduler with this request's history. fresh: what it had before the first step.
        beside: on the head of an I2V model, the channels beside the latents, float32 [1, 4 + C, F', H', W'];
            with split experts, whose second head needs them too, or where steps are skipped, which the tail makes, they
            are in the conditioning.
        decoding: the decode under way, as this stage's decoder keeps it.
        prompts: on the head, where embeddings of its prompts are kept.
        preview: where a picture is due, what the step says that the latents come to.
        residuals: on the tail, by branch, what the blocks of the last computed step have added to what went in,
            [1, s, D]; there while the next step is skipped.
        ratios: on the tail of a job that calibrates, by branch, of each step (`residuals.ratio`).
        uniform: by expert, for each of its steps whether all tokens have the same time embedding.
    """

    job: WanJob
    image: KeyFrames | None = None
    steps: list[Step] = field(default_factory=list)
    latent_shape: tuple[int, ...] = ()
    tokens: int = 0
    shards: Any = None
    keeps_first_frame: bool = False
    names: tuple[str, ...] = ()
    rotary: tuple[torch.Tensor, torch.Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    solver: Any = None
    fresh: dict[str, Any] = field(default_factory=dict)
    beside: torch.Tensor | None = None
    decoding: Any = None
    prompts: dict[Branch, Slot] = field(default_factory=dict)
    preview: torch.Tensor | None = None
    residuals: dict[Branch, torch.Tensor] = field(default_factory=dict)
    ratios: dict[Branch, list[torch.Tensor]] = field(default_factory=dict)
    uniform: dict[int, list[bool]] = field(default_factory=dict)

    def conditioned(self, name: str) -> torch.Tensor:
        """A tensor of the conditioning."""
        return self.conditioning[self.names.index(name)]

    @property
    def experts(self) -> list[int]:
        """Those that make its steps."""
        return sorted({step.expert for step in self.steps})

    def position_in_expert(self, step: int) -> int:
        """The step's number among those of its expert."""
        return sum(earlier.expert == self.steps[step].expert for earlier in self.steps[:step])

    def with_first_frame(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents with the given first frame put back (diffusers' arithmetic, so that bits agree)."""
        if not self.keeps_first_frame:
            return latents
        mask = torch.ones(1, 1, *latents.shape[2:], device=latents.device)
        mask[:, :, 0] = 0
        return (1 - mask) * self.conditioned(FIRST_FRAME) + mask * latents

    def made(self, item: WorkItem, ends: bool) -> Hidden:
        """Of ENCODE also what stays on the head: an image's latents may be nowhere else."""
        made = super().made(item, ends)
        return (*made, self.beside) if item.kind is Kind.ENCODE and self.beside is not None else made

    def final_latents(self) -> torch.Tensor:
        """What the user gets and what is decoded, float32 [1, C, F', H', W']."""
        assert self.latents is not None
        return self.with_first_frame(self.latents).float()

    def end_denoising(self) -> None:
        """Free what decoding does not need."""
        kept = (FIRST_FRAME,) if self.keeps_first_frame and self.conditioning else ()
        self.conditioning = tuple(self.conditioned(name) for name in kept)
        self.names = kept
        self.rotary = torch.empty(0), torch.empty(0)
        self.beside = self.solver = None
        self.fresh, self.residuals = {}, {}


def text_name(expert: int, branch: Branch) -> str:
    """Of a projected prompt in the conditioning."""
    return f"text.{expert}.{branch.name.lower()}"
