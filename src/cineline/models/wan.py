"""Wan 2.2 cut over stages, from diffusers' own modules.

The head holds patch and condition embedders, text encoder and VAE encoder; the tail the output
projection and the VAE decoder; the blocks of all experts are shared out alike.

Legend: S tokens, D model width, N distinct timesteps of a forward (2 with a given first frame in a
TI2V model, else 1), B rows of a product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn

from cineline.channel import TensorSpec
from cineline.codec.text import TOKENS, TextEncoder
from cineline.codec.vae import DecodeState, FrameDecoder, ImageEncoder
from cineline.denoise import Step, combine, make_solver, make_steps
from cineline.models.pipeline_parallel import Hidden, PipelineParallelMixin, RequestState, StagePart
from cineline.models.weights import Weights
from cineline.request import Branch, Job
from cineline.spec import WanSpec

FEW_ROWS = 4
"""Rows of the time embedding's products that stand for S equal ones; fewer take another kernel."""


@dataclass
class WanState(RequestState):
    """One Wan request on one stage.

    Attributes:
        steps: timestep, expert and guidance of every step.
        latent_shape: [1, C, F', H', W'].
        rotary: cosines and sines of the positions, float32 [1, S, 1, head dim] each.
        solver: on the tail, diffusers' scheduler with this request's history.
        condition: on the head of an I2V model, the channels beside the latents, float32 [1, 4 + C, F', H', W'].
        decoding: on the tail, the decode under way.
    """

    steps: list[Step] = field(default_factory=list)
    latent_shape: tuple[int, ...] = ()
    rotary: tuple[torch.Tensor, torch.Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    solver: Any = None
    condition: torch.Tensor | None = None
    decoding: DecodeState | None = None

    def position_in_expert(self, step: int) -> int:
        """The step's number among those of its expert."""
        return sum(earlier.expert == self.steps[step].expert for earlier in self.steps[:step])


class WanStages(PipelineParallelMixin[WanState]):
    """One stage of a Wan 2.2 model."""

    def __init__(self, spec: WanSpec) -> None:
        self._spec = spec
        self._experts: list[Any] = []
        self._few_rows_equal: dict[tuple[int, int], bool] = {}

    def load(self, part: StagePart) -> int:
        self._part = part
        self._device = part.device
        self._dtype = getattr(torch, part.config.dtype)
        vae_dtype = getattr(torch, part.config.vae_dtype)
        folder = self._spec.folder
        read = sum(self._load_expert(name) for name in self._spec.experts)
        if part.is_head:
            self._text = TextEncoder(folder, self._dtype, self._device)
            read += self._text.bytes_read
        if part.is_head and self._spec.kind != "t2v":
            self._image = ImageEncoder(folder, vae_dtype, self._device)
            read += self._image.bytes_read
        if part.is_tail:
            self._frames = FrameDecoder(folder, vae_dtype, self._device)
            read += self._frames.bytes_read
        return read

    def _load_expert(self, name: str) -> int:
        weights = Weights(self._spec.folder / name)
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(self._spec.transformer)
        weights.check_names(model.state_dict(), ignored=model._keys_to_ignore_on_load_unexpected)
        rope = type(model.rope)(
            self._spec.transformer["attention_head_dim"], self._spec.patch, self._spec.transformer["rope_max_seq_len"]
        )
        model.rope = rope.to(self._device)
        # Keyed by the block's number in the whole model, so that names stay the stored ones.
        model.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in self._part.layers})
        if not self._part.is_head:
            del model.patch_embedding, model.condition_embedder
        if not self._part.is_tail:
            del model.norm_out, model.proj_out, model.scale_shift_table
        weights.load(model, self._dtype, self._device, fp32=model._keep_in_fp32_modules)
        self._experts.append(model)
        return weights.bytes_read

    def admit(self, job: Job, image: Image.Image | None) -> WanState:
        solver = make_solver(self._spec.scheduler_class, self._spec.scheduler, job, self._device)
        shape = self._spec.latent_shape(job)
        state = WanState(job, image, steps=make_steps(solver, job), latent_shape=shape)
        state.rotary = self._experts[0].rope(torch.empty(shape, device="meta"))
        if self._part.is_tail:
            state.solver = solver
        if self._part.is_head or self._part.is_tail:
            generator = torch.Generator("cpu").manual_seed(job.seed)
            state.latents = randn_tensor(shape, generator=generator, device=self._device, dtype=torch.float32)
        return state

    # Encode: prompt, image and timesteps to what every stage needs.

    def conditioning_specs(self, state: WanState) -> Mapping[str, TensorSpec]:
        width = self._spec.transformer["num_attention_heads"] * self._spec.transformer["attention_head_dim"]
        rows = self._distinct(state)
        specs = {}
        for expert in self._experts_used(state):
            steps = sum(step.expert == expert for step in state.steps)
            for branch in range(state.job.branches):
                specs[_text_name(expert, Branch(branch))] = TensorSpec((1, TOKENS, width), self._dtype)
            specs[f"time.{expert}"] = TensorSpec((steps, rows, width), self._dtype)
            specs[f"modulation.{expert}"] = TensorSpec((steps, rows, 6, width), self._dtype)
        if self._keeps_first_frame(state):
            _, channels, _, height, width_ = state.latent_shape
            specs["first_frame"] = TensorSpec((1, channels, 1, height, width_), torch.float32)
        return specs

    def encode(self, state: WanState) -> Mapping[str, torch.Tensor]:
        job = state.job
        prompts = [job.prompt, job.negative_prompt][: job.branches]
        embeddings = [self._text.encode(prompt) for prompt in prompts]
        made = {}
        for expert in self._experts_used(state):
            embedder = self._experts[expert].condition_embedder
            for branch, embedding in enumerate(embeddings):
                made[_text_name(expert, Branch(branch))] = embedder.text_embedder(embedding)
            rows = [self._embed_time(state, expert, step) for step in state.steps if step.expert == expert]
            made[f"time.{expert}"] = torch.stack([time for time, _ in rows])
            made[f"modulation.{expert}"] = torch.stack([modulation for _, modulation in rows])
        if state.image is not None:
            condition = self._condition(state, state.image)
            state.image = None
            if self._keeps_first_frame(state):
                made["first_frame"] = condition
            else:
                state.condition = condition
        return {name: made[name] for name in self.conditioning_specs(state)}

    def _condition(self, state: WanState, image: Image.Image) -> torch.Tensor:
        """The image as latents: of one frame (TI2V), or of a whole clip with its mask before it (I2V)."""
        job = state.job
        if self._keeps_first_frame(state):
            return self._image.encode(image, job.height, job.width, num_frames=1)
        latents = self._image.encode(image, job.height, job.width, job.num_frames)
        given = torch.zeros(1, self._spec.vae_frames, *latents.shape[2:], device=self._device)
        given[:, :, 0] = 1
        return torch.cat([given, latents], dim=1)

    def _embed_time(self, state: WanState, expert: int, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Time embedding [N, D] and modulation [N, 6, D] of one step.

        diffusers embeds one row a forward, or S with `expand_timesteps` of which at most two differ.
        A product's bits depend on the number of its rows: where a few rows give another result than S,
        which is tried once for each S, all S are computed.
        """
        embed = self._experts[expert].condition_embedder
        if self._spec.kind != "ti2v":
            return _time_rows(embed, step.timestep.reshape(1), self._dtype, per_token=False)
        tokens = state.rotary[0].shape[1]
        per_frame = tokens // state.latent_shape[2]
        times = [step.timestep]
        if self._keeps_first_frame(state):
            times.insert(0, torch.zeros_like(step.timestep))
        few = torch.stack(times).float().repeat_interleave(FEW_ROWS)
        picked = torch.arange(len(times), device=few.device)

        def from_few() -> tuple[torch.Tensor, torch.Tensor]:
            time, modulation = _time_rows(embed, few, self._dtype, per_token=True)
            return time[picked * FEW_ROWS], modulation[picked * FEW_ROWS]

        def from_all() -> tuple[torch.Tensor, torch.Tensor]:
            all_rows = times[-1].float().repeat(tokens)
            if len(times) == 2:
                all_rows[:per_frame] = 0
            time, modulation = _time_rows(embed, all_rows, self._dtype, per_token=True)
            rows = torch.tensor([0, tokens - 1][-len(times) :], device=few.device)
            return time[rows], modulation[rows]

        key = (tokens, len(times))
        if key not in self._few_rows_equal:
            pairs = zip(from_few(), from_all(), strict=True)
            self._few_rows_equal[key] = all(torch.equal(small, large) for small, large in pairs)
        return from_few() if self._few_rows_equal[key] else from_all()

    # Denoise: one forward of one branch of one step.

    def hidden_specs(self, state: WanState) -> tuple[TensorSpec, ...]:
        width = self._spec.transformer["num_attention_heads"] * self._spec.transformer["attention_head_dim"]
        return (TensorSpec((1, state.rotary[0].shape[1], width), self._dtype),)

    def latents_spec(self, state: WanState) -> TensorSpec:
        return TensorSpec(state.latent_shape, torch.float32)

    def embed(self, state: WanState, step: int, branch: Branch) -> Hidden:
        assert state.latents is not None
        model = self._experts[state.steps[step].expert]
        latents = self._with_first_frame(state, state.latents)
        if state.condition is not None:
            latents = torch.cat([latents, state.condition], dim=1)
        hidden = model.patch_embedding(latents.to(self._dtype))
        return (hidden.flatten(2).transpose(1, 2).contiguous(),)

    def run_blocks(self, state: WanState, step: int, branch: Branch, hidden: Hidden) -> Hidden:
        expert = state.steps[step].expert
        text = state.conditioning[_text_name(expert, branch)]
        modulation = state.conditioning[f"modulation.{expert}"][state.position_in_expert(step)]
        if self._spec.kind == "ti2v":
            modulation = self._per_token(state, modulation)
        (states,) = hidden
        for block in self._experts[expert].blocks.values():
            states = block(states, text, modulation, state.rotary)
        return (states,)

    def predict(self, state: WanState, step: int, branch: Branch, hidden: Hidden) -> torch.Tensor:
        """Output norm, projection and unpatchify, as the end of `WanTransformer3DModel.forward`."""
        expert = state.steps[step].expert
        model = self._experts[expert]
        time = state.conditioning[f"time.{expert}"][state.position_in_expert(step)]
        if self._spec.kind == "ti2v":
            time = self._per_token(state, time)  # [1, S or 1, D]
            shift, scale = (model.scale_shift_table.unsqueeze(0) + time.unsqueeze(2)).chunk(2, dim=2)
            shift, scale = shift.squeeze(2), scale.squeeze(2)
        else:
            shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        (states,) = hidden
        states = (model.norm_out(states.float()) * (1 + scale) + shift).type_as(states)
        return self._unpatchify(state, model.proj_out(states))

    def _unpatchify(self, state: WanState, patches: torch.Tensor) -> torch.Tensor:
        _, _, frames, height, width = state.latent_shape
        patch = self._spec.patch
        grid = (frames // patch[0], height // patch[1], width // patch[2])
        patches = patches.reshape(1, *grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def advance(self, state: WanState, step: int) -> torch.Tensor:
        prediction = combine(state.predictions, state.steps[step].guidance)
        latents: torch.Tensor = state.solver.step(
            prediction, state.steps[step].timestep, state.latents, return_dict=False
        )[0]
        state.latents = latents
        return latents

    def final_latents(self, state: WanState) -> torch.Tensor:
        assert state.latents is not None
        return self._with_first_frame(state, state.latents)[0]

    def decode(self, state: WanState, chunk: int) -> np.ndarray:
        if state.decoding is None:
            state.decoding = self._frames.start(self.final_latents(state).unsqueeze(0))
        return self._frames.decode(state.decoding, chunk)

    # Facts of a request.

    def _experts_used(self, state: WanState) -> list[int]:
        return sorted({step.expert for step in state.steps})

    def _keeps_first_frame(self, state: WanState) -> bool:
        """TI2V with an image: the first latent frame is given, not denoised."""
        return self._spec.kind == "ti2v" and state.job.has_image

    def _distinct(self, state: WanState) -> int:
        return 2 if self._keeps_first_frame(state) else 1

    def _with_first_frame(self, state: WanState, latents: torch.Tensor) -> torch.Tensor:
        """The latents with the given first frame put back (diffusers' arithmetic, so that bits agree)."""
        if not self._keeps_first_frame(state):
            return latents
        mask = torch.ones(1, 1, *latents.shape[2:], device=latents.device)
        mask[:, :, 0] = 0
        return (1 - mask) * state.conditioning["first_frame"] + mask * latents

    def _per_token(self, state: WanState, rows: torch.Tensor) -> torch.Tensor:
        """[N, ...] to [1, S, ...]: the first frame's tokens take row 0, or [1, 1, ...] where all are alike."""
        if rows.shape[0] == 1:
            return rows.unsqueeze(0)
        tokens = state.rotary[0].shape[1]
        per_frame = tokens // state.latent_shape[2]
        first, rest = (
            row.expand(count, *row.shape) for row, count in zip(rows, (per_frame, tokens - per_frame), strict=True)
        )
        return torch.cat([first, rest]).unsqueeze(0)


def _text_name(expert: int, branch: Branch) -> str:
    return f"text.{expert}.{branch.name.lower()}"


def _time_rows(
    embedder: Any, timesteps: torch.Tensor, dtype: torch.dtype, per_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Time embedding [B, D] and modulation [B, 6, D] of timesteps [B] (`WanTimeTextImageEmbedding.forward`)."""
    frequencies = embedder.timesteps_proj(timesteps)
    if per_token:
        frequencies = frequencies.unsqueeze(0)  # diffusers has a batch dimension here, and products may see it
    frequencies = frequencies.to(next(embedder.time_embedder.parameters()).dtype)
    time = embedder.time_embedder(frequencies).to(dtype)
    modulation = embedder.time_proj(embedder.act_fn(time))
    return time.flatten(0, -2), modulation.flatten(0, -2).unflatten(1, (6, -1))
