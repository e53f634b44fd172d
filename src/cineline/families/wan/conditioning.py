"""What the head makes once a request for all stages: projected prompts and images, time embeddings, the first frame.

Legend: S tokens, D model width, B rows of a product, K distinct rows of a time embedding (1, or with
`expand_timesteps` as many as `TIME_ROWS` and S allow).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from cineline.core.request import Branch, WorkItem
from cineline.families.pipeline_parallel import StagePart
from cineline.families.prompts import Prompts
from cineline.families.wan.clip import ClipEncoder
from cineline.families.wan.constants import TEXT_TOKENS, TIME_ROWS
from cineline.families.wan.denoise import Step
from cineline.families.wan.experts import Experts
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.state import FIRST_FRAME, WanState, text_name
from cineline.families.wan.vae import ImageEncoder, vae_of
from cineline.transport.channel import TensorSpec

log = logging.getLogger(__name__)


class Conditioner:
    """Makes it on the head, which has the VAE's encoder where the model takes images, and the CLIP encoder of Wan 2.1;
    all stages know the shapes.

    Args:
        experts: of which the head has the condition embedders.

    Attributes:
        bytes_read: of both encoders' weights.
    """

    def __init__(self, spec: WanSpec, part: StagePart, experts: Experts) -> None:
        self._spec, self._part, self._experts = spec, part, experts
        self._device, self._dtype = part.device, getattr(torch, part.config.dtype)
        self._images = self._clip = None
        self._vae_dtype = getattr(torch, part.config.vae_dtype)
        if spec.kind != "t2v" and part.is_head and part.place.is_first_lane:
            self._images = ImageEncoder(vae_of(spec), self._vae_dtype, part.device)
            self._clip = ClipEncoder(spec, self._vae_dtype, part.device) if spec.image else None
        self.bytes_read = sum(each.bytes_read for each in (self._images, self._clip) if each)
        self._prompts = Prompts(part.parallel.cfg)
        self._axes = [part.axis(name) for name in ("ring", "ulysses", "tp")]

    @property
    def embedding(self) -> TensorSpec:
        """Of a prompt's embedding, [1, 512, text width]."""
        return TensorSpec((1, TEXT_TOKENS, int(self._spec.text["d_model"])), self._dtype)

    def specs(self, state: WanState) -> dict[str, TensorSpec]:
        """Names, order, shapes and dtypes of what is made."""
        width = self._spec.transformer["num_attention_heads"] * self._spec.transformer["attention_head_dim"]
        times = min(TIME_ROWS, state.tokens) if self._spec.kind == "ti2v" else 1
        specs = {}
        for expert in state.experts:
            steps = sum(step.expert == expert for step in state.steps)
            for branch in self._part.branches(state.job):
                rows = self._spec.image_rows + TEXT_TOKENS
                specs[text_name(expert, branch)] = TensorSpec((1, rows, width), self._dtype)
            specs[f"time.{expert}"] = TensorSpec((steps, times, width), self._dtype)
            specs[f"modulation.{expert}"] = TensorSpec((steps, times, 6, width), self._dtype)
            if self._spec.kind == "ti2v":
                specs[f"row.{expert}"] = TensorSpec((steps, state.tokens), torch.uint8)
        _, channels, _, height, width_ = state.latent_shape
        if state.keeps_first_frame:
            specs[FIRST_FRAME] = TensorSpec((1, channels, 1, height, width_), torch.float32)
        elsewhere = len(self._part.parallel.groups) > 1 or state.job.skipped or state.job.calibrates
        if self._spec.kind == "i2v" and elsewhere:
            beside = self._spec.transformer["in_channels"] - channels
            specs["condition"] = TensorSpec((1, beside, *state.latent_shape[2:]), torch.float32)
        return specs

    def admit(self, state: WanState) -> None:
        """A new request; on the first rank of the head it may find prompts of others."""
        if self._part.is_head and self._part.place.is_first_lane:
            state.prompts = self._prompts.admit(state.job, self._part.branches(state.job))

    def compute(self, state: WanState, item: WorkItem, starts: bool, ends: bool) -> None:
        """On the head it is made; the others only hand it on."""
        if starts:
            state.conditioning = self.make(state)

    def make(self, state: WanState) -> tuple[Tensor, ...]:
        """All of it, in the order of `specs`; the prompts' embeddings are used up."""
        self._experts.take_turn(state)
        embeddings = {branch: self._embedding(state, branch) for branch in self._part.branches(state.job)}
        pictures = self._pictures(state) if self._spec.image else None
        made = {}
        for expert in state.experts:
            embedder = self._experts.models[expert].condition_embedder
            before = [] if pictures is None else [embedder.image_embedder(pictures)]
            for branch, embedding in embeddings.items():
                made[text_name(expert, branch)] = torch.cat([*before, embedder.text_embedder(embedding)], dim=1)
            rows = [self._embed_time(state, expert, step) for step in state.steps if step.expert == expert]
            for name, stacked in zip(("time", "modulation", "row"), zip(*rows, strict=True), strict=True):
                made[f"{name}.{expert}"] = torch.stack(stacked)
        if state.keeps_first_frame:
            made[FIRST_FRAME] = self._encoded(state, 1)
        elif state.job.has_image:
            made["condition"] = state.beside = self._with_mask(state, self._encoded(state, state.job.num_frames))
        state.texts.clear()
        state.prompts.clear()
        return tuple(made[name] for name in state.names)

    def _embedding(self, state: WanState, branch: Branch) -> Tensor:
        """A prompt's; the stage's first rank has it and hands it to the others."""
        if self._part.place.is_first_lane:
            return self._hand_out(Prompts.embedding(state.prompts, branch, state.texts))
        return self._hand_out(torch.empty(self.embedding.shape, dtype=self._dtype, device=self._device))

    def _hand_out(self, tensor: Tensor) -> Tensor:
        """The tensor of the stage's first rank, on all of them."""
        for axis in self._axes:
            axis.broadcast(tensor)
        return tensor

    def _pictures(self, state: WanState) -> Tensor:
        """What the CLIP encoder sees in the images, [images, rows, its width], in the transformer's dtype."""
        if self._clip is not None:
            assert state.image is not None
            seen = self._clip.encode([image for image in state.image if image is not None]).contiguous()
        else:
            assert self._spec.image is not None
            shape = self._spec.pictures, self._spec.picture_rows, int(self._spec.image["hidden_size"])
            seen = torch.empty(shape, dtype=self._vae_dtype, device=self._device)
        return self._hand_out(seen).to(self._dtype)

    def _encoded(self, state: WanState, frames: int) -> Tensor:
        """The image as latents of a clip of so many frames that begins with it, and may end with another."""
        job = state.job
        if self._images is not None:
            assert state.image is not None
            latents = self._images.encode(*state.image, job.height, job.width, frames).contiguous()
            state.image = None
        else:
            batch, channels, all_frames, height, width = state.latent_shape
            latents = torch.empty(batch, channels, min(frames, all_frames), height, width, device=self._device)
        return self._hand_out(latents)

    def _with_mask(self, state: WanState, latents: Tensor) -> Tensor:
        """I2V's channels beside the latents: which frames are given, and the clip."""
        given = torch.zeros(1, self._spec.vae_frames, *latents.shape[2:], device=self._device)
        given[:, :, 0] = 1
        if state.job.has_last_image:
            given[:, -1, -1] = 1
        return torch.cat([given, latents], dim=1)

    def _embed_time(self, state: WanState, expert: int, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Time embedding [K, D] and modulation [K, 6, D] of one step, and each token's row in them, [S].

        diffusers embeds one row a forward, or S with `expand_timesteps`, of which at most two timesteps
        differ. The bits of a row depend on the number of rows and on its place among them, so as many are
        made here, and the distinct ones are kept.
        """
        embed = self._experts.models[expert].condition_embedder
        if self._spec.kind != "ti2v":
            time, modulation = _time_rows(embed, step.timestep.reshape(1), self._dtype, per_token=False)
            return time, modulation, torch.zeros(1, dtype=torch.uint8)
        times = step.timestep.float().repeat(state.tokens)
        if state.keeps_first_frame:
            times[: state.tokens // state.latent_shape[2]] = 0
        time, modulation = _time_rows(embed, times, self._dtype, per_token=True)
        first, row = _distinct_rows(torch.cat([time, modulation.flatten(1)], dim=1), min(TIME_ROWS, state.tokens))
        return time[first], modulation[first], row


def _time_rows(embedder: Any, timesteps: Tensor, dtype: torch.dtype, per_token: bool) -> tuple[Tensor, Tensor]:
    """Time embedding [B, D] and modulation [B, 6, D] of timesteps [B] (`WanTimeTextImageEmbedding.forward`)."""
    frequencies = embedder.timesteps_proj(timesteps)
    if per_token:
        frequencies = frequencies.unsqueeze(0)  # diffusers has a batch dimension here, and products may see it
    frequencies = frequencies.to(next(embedder.time_embedder.parameters()).dtype)
    time = embedder.time_embedder(frequencies).to(dtype)
    modulation = embedder.time_proj(embedder.act_fn(time))
    return time.flatten(0, -2), modulation.flatten(0, -2).unflatten(1, (6, -1))


def _distinct_rows(rows: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The places [slots] of the first rows that differ in any bit, and each row's number among them, uint8 [S].

    The host looks at the device once for each of them.
    """
    rows = rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16)
    count = rows.shape[0]
    number = torch.zeros(count, dtype=torch.uint8, device=rows.device)
    left = torch.ones(count, dtype=torch.bool, device=rows.device)
    everywhere = torch.arange(count, device=rows.device)
    places, place = torch.zeros(slots, dtype=torch.int64, device=rows.device), 0
    for slot in range(slots):
        places[slot] = place
        alike = left & (rows == rows[place]).all(dim=1)
        number.masked_fill_(alike, slot)
        left &= ~alike
        place = int(torch.where(left, everywhere, count).amin())
        if place == count:
            break
    else:
        log.warning("The time embedding has more than %d distinct rows: bits may differ from diffusers'.", slots)
    return places, number
