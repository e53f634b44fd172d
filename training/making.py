"""The stages of a mini model's making, each after those it needs.

What is done already is not done again; what was interrupted goes on where its last checkpoint was.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from training.export import export
from training.latents import encode_clips
from training.loop import Schedule
from training.recipes import CLIPS, FRAMES, PICTURE, POLISH, RECIPES
from training.transformer import Batch, Latents, Student, train_transformer
from training.vae import quality, statistics, train_vae

WORK = Path("out/mini")
MODELS = Path("src/cineline/minis")

Weights = dict[str, Tensor]


class Making:
    """The stages of a model; each has the results of those before it made, or read, first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.recipe = RECIPES[name]
        # Of another recipe nothing must be used again.
        self.folder = WORK / f"{name}-{zlib.crc32(repr((self.recipe, CLIPS, FRAMES)).encode()):08x}"

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        recipe = self.recipe
        vae = train_vae(dict(recipe.vae), recipe.side, recipe.vae_phases, recipe.vae_schedule, self.folder / "vae.pt")
        mean, deviation = statistics(vae, recipe.side, FRAMES)
        vae.register_to_config(latents_mean=mean, latents_std=deviation)
        first, every = quality(vae, recipe.side, FRAMES)
        print(f"The VAE's round trip: {first:.1f} dB in first frames, {every:.1f} dB in all", flush=True)
        return vae

    @cached_property
    def latents(self) -> Latents:
        return encode_clips(self.vae, self.recipe.side, FRAMES, CLIPS, self.folder / "latents.pt")

    @cached_property
    def pictures(self) -> Weights:
        return self._train("pictures", 0, self.recipe.pictures, batches=[PICTURE])

    @cached_property
    def video(self) -> Weights:
        return self._train("video", 1, self.recipe.video, self.pictures)

    @cached_property
    def experts(self) -> list[Weights]:
        """Of the high-noise and the low-noise expert, or of the one transformer there is."""
        recipe = self.recipe
        if recipe.polish is not None:
            return [self._train("polish", 4, recipe.polish, self.video, batches=POLISH)]
        assert recipe.boundary_ratio is not None and recipe.high is not None and recipe.low is not None
        high = self._train("high", 2, recipe.high, self.video, (recipe.boundary_ratio, 1.0), train_text=False)
        low = self._train("low", 3, recipe.low, self.video, (0.0, recipe.boundary_ratio), train_text=False)
        return [high, low]

    def export(self) -> None:
        """Write the model as it ships."""
        students = [self._student(weights) for weights in self.experts]
        export(self.recipe, self.name, self.vae, students, self.folder, MODELS / self.name)

    def _student(self, weights: Weights | None) -> Student:
        torch.manual_seed(0)
        student = Student(self.recipe.transformer, self.recipe.grid)
        if weights is not None:
            student.load_state_dict(weights)
        return student

    def _train(
        self,
        stage: str,
        number: int,
        schedule: Schedule,
        weights: Weights | None = None,
        noise: tuple[float, float] = (0.0, 1.0),
        batches: Sequence[Batch] | None = None,
        train_text: bool = True,
    ) -> Weights:
        student = self._student(weights)
        student.text_encoder.requires_grad_(train_text)
        checkpoint = self.folder / f"{stage}.pt"
        return train_transformer(
            student, self.latents, batches or self.recipe.batches, noise, number, schedule, checkpoint
        )
