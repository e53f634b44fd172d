"""Wan 2.2 cut over stages, from diffusers' own modules.

The head holds patch and condition embedders, tokenizer and VAE encoder, the tail the output projection; the blocks of
all experts, the text encoder's layers and the VAE decoder's units are shared out.

Legend: S tokens, D model width, B rows of a product, K distinct rows of a time embedding (1, or with
`expand_timesteps` as many as `TIME_ROWS` and S allow).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn

from cineline.core.request import Branch, Job
from cineline.families.pipeline_parallel import Hidden, PipelineParallelMixin, RequestState, StagePart
from cineline.families.wan.constants import TEXT_TOKENS, TIME_ROWS
from cineline.families.wan.costs.vae import VaeCosts
from cineline.families.wan.decoder import Decoder, DecoderSlice, TiledDecoder, boundary_specs
from cineline.families.wan.denoise import Step, combine, history_of, make_solver, make_steps, rehearse
from cineline.families.wan.rows import RowDecoder
from cineline.families.wan.sequence_parallel import ShardedAttention, TokenShards
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.tensor_parallel import shard_block
from cineline.families.wan.text import TextSlice, Tokenizer
from cineline.families.wan.vae import ImageEncoder
from cineline.transport.channel import TensorSpec
from cineline.weights.files import Shard, Weights

log = logging.getLogger(__name__)


@dataclass
class WanState(RequestState):
    """One Wan request on one stage.

    Attributes:
        steps: timestep, expert and guidance of every step.
        latent_shape: [1, C, F', H', W'].
        tokens: S.
        shards: this rank's share of them.
        rotary: cosines and sines of this rank's positions, float32 [1, s, 1, head dim] each.
        solver: on the tail, diffusers' scheduler with this request's history.
        condition: on the head of an I2V model, the channels beside the latents, float32 [1, 4 + C, F', H', W'];
            with split experts, whose second head needs them too, they are in the conditioning.
        decoding: the decode under way, as this stage's decoder keeps it.
        uniform: by expert, for each of its steps whether all tokens have the same time embedding.
    """

    steps: list[Step] = field(default_factory=list)
    latent_shape: tuple[int, ...] = ()
    tokens: int = 0
    shards: Any = None
    rotary: tuple[torch.Tensor, torch.Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    solver: Any = None
    condition: torch.Tensor | None = None
    decoding: Any = None
    uniform: dict[int, list[bool]] = field(default_factory=dict)

    def position_in_expert(self, step: int) -> int:
        """The step's number among those of its expert."""
        return sum(earlier.expert == self.steps[step].expert for earlier in self.steps[:step])


class WanStages(PipelineParallelMixin[WanState]):
    """One stage of a Wan 2.2 model."""

    def __init__(self, spec: WanSpec) -> None:
        self._spec = spec
        self._experts: list[Any] = []
        self._groups: list[range] = []
        self._vae = VaeCosts.of(spec.vae)

    def load(self, part: StagePart) -> int:
        self._part = part
        self._device = part.device
        self._dtype = getattr(torch, part.config.dtype)
        vae_dtype = getattr(torch, part.config.vae_dtype)
        folder = self._spec.folder
        self._ring, self._ulysses, self._tp = (part.axis(name) for name in ("ring", "ulysses", "tp"))
        rope = WanRotaryPosEmbed(
            self._spec.transformer["attention_head_dim"], self._spec.patch, self._spec.transformer["rope_max_seq_len"]
        )
        self._rope = rope.to(self._device)
        self._groups = [part.parallel.route(expert) for expert in range(len(self._spec.experts))]
        read = sum(self._load_expert(expert) for expert in range(len(self._groups)))
        if part.place.is_first_lane:
            self._text = TextSlice(
                folder, part.cut.text, part.is_head, part.is_tail, self._dtype, self._device, part.config.text_encoder
            )
            read += self._text.bytes_read
        if part.is_head and part.place.is_first_lane:
            self._tokenizer = Tokenizer(folder)
        if part.is_head and part.place.is_first_lane and self._spec.kind != "t2v":
            self._image = ImageEncoder(folder, vae_dtype, self._device)
            read += self._image.bytes_read
        if part.decodes:
            self._decoder = self._load_decoder(folder, vae_dtype)
            read += self._decoder.bytes_read
        return read

    def _load_decoder(self, folder: Path, dtype: torch.dtype) -> Decoder:
        way = self._part.parallel.vae_decode
        if way == "rows":
            return RowDecoder(folder, dtype, self._device, self._part.axis("pp"))
        if way == "tiled":
            return TiledDecoder(folder, dtype, self._device)
        return DecoderSlice(folder, self._part.cut.decoder, dtype, self._device, self._part.takes_latents)

    def _load_expert(self, expert: int) -> int:
        """Build and read what this rank needs of an expert: its blocks, and what stands before and after them.

        The condition embedders of all experts are on the line's head, which embeds for every stage.
        """
        weights = Weights(self._spec.folder / self._spec.experts[expert])
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(self._spec.transformer)
        weights.check_names(model.state_dict(), ignored=model._keys_to_ignore_on_load_unexpected)
        stage, group = self._part.place.pp, self._groups[expert]
        layers = self._part.cut.blocks if stage in group else range(0)
        # Keyed by the block's number in the whole model, so that names stay the stored ones.
        model.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in layers})
        if not self._part.is_head:
            del model.condition_embedder
        if stage != group.start:
            del model.patch_embedding
        if stage != group.stop - 1:
            del model.norm_out, model.proj_out, model.scale_shift_table
        del model.rope
        shards: dict[str, Shard] = {}
        for layer, block in model.blocks.items():
            if self._ring.size * self._ulysses.size > 1:
                block.attn1.processor = ShardedAttention(self._ring, self._ulysses)
            if self._tp.size > 1:
                parts = shard_block(block, self._tp)
                shards |= {f"blocks.{layer}.{name}": shard for name, shard in parts.items()}
        weights.load(model, self._dtype, self._device, fp32=model._keep_in_fp32_modules, shards=shards)
        self._experts.append(model)
        return weights.bytes_read

    def admit(self, job: Job, image: Image.Image | None) -> WanState:
        solver = make_solver(self._spec.scheduler_class, self._spec.scheduler, job, self._device)
        shape = self._spec.latent_shape(job)
        state = WanState(job, image, steps=make_steps(solver, job), latent_shape=shape)
        cos, sin = self._rope(torch.empty(shape, device="meta"))
        state.tokens = cos.shape[1]
        state.shards = TokenShards(state.tokens, self._ring, self._ulysses)
        state.rotary = state.shards.cut(cos), state.shards.cut(sin)
        stage = self._part.place.pp
        starts, ends = {group.start for group in self._groups}, {group.stop - 1 for group in self._groups}
        if stage in ends:
            state.solver = solver
        if stage == self._groups[-1].stop - 1 > self._groups[0].stop - 1:
            rehearse(solver, sum(step.expert == 0 for step in state.steps), shape, self._dtype)
        if stage in starts | ends:
            generator = torch.Generator("cpu").manual_seed(job.seed)
            state.latents = randn_tensor(shape, generator=generator, device=self._device, dtype=torch.float32)
        return state

    # Split experts: a request moves once from the stages of one to those of the other.

    def expert(self, state: WanState, step: int) -> int:
        return state.steps[step].expert

    # The structure of a solver's history follows from the steps it has made, whatever went through it: the second
    # group's end rehearses the first one's steps at admission, and takes the values in when they come.

    def history_specs(self, state: WanState) -> tuple[TensorSpec, ...]:
        kept = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in history_of(state.solver)]
        return self.latents_spec(state), *kept

    def history(self, state: WanState) -> list[torch.Tensor]:
        return history_of(state.solver)

    def take_history(self, state: WanState, tensors: Sequence[torch.Tensor]) -> None:
        state.latents = tensors[0].clone()
        for own, received in zip(history_of(state.solver), tensors[1:], strict=True):
            own.copy_(received)

    # Text: a prompt through the encoder's layers, from stage to stage.

    def text_specs(self, state: WanState) -> tuple[TensorSpec, ...]:
        return self.embedding_spec(state), TensorSpec((1, TEXT_TOKENS), torch.int64)

    def embedding_spec(self, state: WanState) -> TensorSpec:
        return TensorSpec((1, TEXT_TOKENS, int(self._spec.text["d_model"])), self._dtype)

    def encode_text(self, state: WanState, branch: Branch, hidden: Hidden) -> Hidden:
        if self._part.is_head:
            hidden = self._tokenizer(state.job.prompt if branch is Branch.COND else state.job.negative_prompt)
        states, mask = hidden
        states = self._text.run(states, mask).to(self._device)
        if branch is self._part.branches(state.job)[-1]:
            self._text.release()
        return (states,) if self._part.is_tail else (states, mask.to(self._device))

    # Encode: embeddings, image and timesteps to what every stage needs.

    def conditioning_specs(self, state: WanState) -> Mapping[str, TensorSpec]:
        width = self._spec.transformer["num_attention_heads"] * self._spec.transformer["attention_head_dim"]
        rows = min(TIME_ROWS, state.tokens) if self._spec.kind == "ti2v" else 1
        specs = {}
        for expert in self._experts_used(state):
            steps = sum(step.expert == expert for step in state.steps)
            for branch in self._part.branches(state.job):
                specs[_text_name(expert, branch)] = TensorSpec((1, TEXT_TOKENS, width), self._dtype)
            specs[f"time.{expert}"] = TensorSpec((steps, rows, width), self._dtype)
            specs[f"modulation.{expert}"] = TensorSpec((steps, rows, 6, width), self._dtype)
            if self._spec.kind == "ti2v":
                specs[f"row.{expert}"] = TensorSpec((steps, state.tokens), torch.uint8)
        if self._keeps_first_frame(state):
            _, channels, _, height, width_ = state.latent_shape
            specs["first_frame"] = TensorSpec((1, channels, 1, height, width_), torch.float32)
        if self._spec.kind == "i2v" and len(self._part.parallel.groups) > 1:
            beside = self._spec.transformer["in_channels"] - state.latent_shape[1]
            specs["condition"] = TensorSpec((1, beside, *state.latent_shape[2:]), torch.float32)
        return specs

    def encode(self, state: WanState) -> Mapping[str, torch.Tensor]:
        job = state.job
        embeddings = {branch: self._embedding(state, branch) for branch in self._part.branches(job)}
        made = {}
        for expert in self._experts_used(state):
            embedder = self._experts[expert].condition_embedder
            for branch, embedding in embeddings.items():
                made[_text_name(expert, branch)] = embedder.text_embedder(embedding)
            rows = [self._embed_time(state, expert, step) for step in state.steps if step.expert == expert]
            for name, stacked in zip(("time", "modulation", "row"), zip(*rows, strict=True), strict=True):
                made[f"{name}.{expert}"] = torch.stack(stacked)
        if job.has_image:
            condition = self._condition(state)
            if self._keeps_first_frame(state):
                made["first_frame"] = condition
            else:
                made["condition"] = state.condition = condition
        return {name: made[name] for name in self.conditioning_specs(state)}

    def _embedding(self, state: WanState, branch: Branch) -> torch.Tensor:
        """A prompt's, [1, 512, text width]; the stage's first rank has it and hands it to the others."""
        if self._part.place.is_first_lane:
            return self._hand_out(state.texts[branch])
        spec = self.embedding_spec(state)
        return self._hand_out(torch.empty(spec.shape, dtype=spec.dtype, device=self._device))

    def _hand_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of the stage's first rank, on all of them."""
        for axis in (self._ring, self._ulysses, self._tp):
            axis.broadcast(tensor)
        return tensor

    def _condition(self, state: WanState) -> torch.Tensor:
        """The image as latents: of one frame (TI2V), or of a whole clip with its mask before it (I2V)."""
        job, first_frame_alone = state.job, self._keeps_first_frame(state)
        if self._part.place.is_first_lane:
            assert state.image is not None
            frames = 1 if first_frame_alone else job.num_frames
            latents = self._image.encode(state.image, job.height, job.width, frames).contiguous()
            state.image = None
        else:
            batch, channels, frames, height, width = state.latent_shape
            shape = batch, channels, 1 if first_frame_alone else frames, height, width
            latents = torch.empty(shape, device=self._device)
        self._hand_out(latents)
        if first_frame_alone:
            return latents
        given = torch.zeros(1, self._spec.vae_frames, *latents.shape[2:], device=self._device)
        given[:, :, 0] = 1
        return torch.cat([given, latents], dim=1)

    def _embed_time(self, state: WanState, expert: int, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Time embedding [K, D] and modulation [K, 6, D] of one step, and each token's row in them, [S].

        diffusers embeds one row a forward, or S with `expand_timesteps`, of which at most two timesteps
        differ. The bits of a row depend on the number of rows and on its place among them, so as many are
        made here, and the distinct ones are kept.
        """
        embed = self._experts[expert].condition_embedder
        if self._spec.kind != "ti2v":
            time, modulation = _time_rows(embed, step.timestep.reshape(1), self._dtype, per_token=False)
            return time, modulation, torch.zeros(1, dtype=torch.uint8)
        times = step.timestep.float().repeat(state.tokens)
        if self._keeps_first_frame(state):
            times[: state.tokens // state.latent_shape[2]] = 0
        time, modulation = _time_rows(embed, times, self._dtype, per_token=True)
        first, row = _distinct_rows(torch.cat([time, modulation.flatten(1)], dim=1), min(TIME_ROWS, state.tokens))
        return time[first], modulation[first], row

    # Denoise: one forward of one branch of one step.

    def hidden_specs(self, state: WanState) -> tuple[TensorSpec, ...]:
        width = self._spec.transformer["num_attention_heads"] * self._spec.transformer["attention_head_dim"]
        own = state.shards.own
        return (TensorSpec((1, own.stop - own.start, width), self._dtype),)

    def latents_spec(self, state: WanState) -> TensorSpec:
        return TensorSpec(state.latent_shape, torch.float32)

    def prediction_spec(self, state: WanState) -> TensorSpec:
        return TensorSpec(state.latent_shape, self._dtype)

    def embed(self, state: WanState, step: int, branch: Branch) -> Hidden:
        assert state.latents is not None
        model = self._experts[state.steps[step].expert]
        latents = self._with_first_frame(state, state.latents)
        condition = state.conditioning.get("condition", state.condition)
        if condition is not None:
            latents = torch.cat([latents, condition], dim=1)
        hidden = model.patch_embedding(latents.to(self._dtype))
        return (state.shards.cut(hidden.flatten(2).transpose(1, 2)).contiguous(),)

    def run_blocks(self, state: WanState, step: int, branch: Branch, hidden: Hidden) -> Hidden:
        expert = state.steps[step].expert
        text = state.conditioning[_text_name(expert, branch)]
        modulation = self._of_step(state, "modulation", step)
        (states,) = hidden
        for block in self._experts[expert].blocks.values():
            if isinstance(block.attn1.processor, ShardedAttention):
                block.attn1.processor.shards = state.shards
            states = block(states, text, modulation, state.rotary)
        return (states,)

    def predict(self, state: WanState, step: int, branch: Branch, hidden: Hidden) -> torch.Tensor:
        """Output norm, projection and unpatchify, as the end of `WanTransformer3DModel.forward`."""
        expert = state.steps[step].expert
        model = self._experts[expert]
        time = self._of_step(state, "time", step)
        if self._spec.kind == "ti2v":
            shift, scale = (model.scale_shift_table.unsqueeze(0) + time.unsqueeze(2)).chunk(2, dim=2)
            shift, scale = shift.squeeze(2), scale.squeeze(2)
        else:
            shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        (states,) = hidden
        states = (model.norm_out(states.float()) * (1 + scale) + shift).type_as(states)
        return self._unpatchify(state, state.shards.gather(model.proj_out(states)))

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

    def end_denoising(self, state: WanState) -> None:
        state.conditioning = {name: kept for name, kept in state.conditioning.items() if name == "first_frame"}
        state.rotary = torch.empty(0), torch.empty(0)
        state.condition = None

    def final_latents(self, state: WanState) -> torch.Tensor:
        assert state.latents is not None
        return self._with_first_frame(state, state.latents)[0]

    def decode_specs(self, state: WanState, chunk: int) -> tuple[TensorSpec, ...]:
        dtype = getattr(torch, self._part.config.vae_dtype)
        return boundary_specs(self._vae, state.latent_shape, chunk, self._part.cut.decoder.start, dtype)

    def decode(self, state: WanState, chunk: int, hidden: Hidden) -> Hidden:
        if state.decoding is None:
            state.decoding = self._decoder.start(self._latents_to_decode(state) if self._part.takes_latents else None)
        return self._decoder.run(state.decoding, chunk, hidden)

    def _latents_to_decode(self, state: WanState) -> torch.Tensor:
        """Final latents [1, C, F', H', W'], where a decode begins; by rows that is on every stage."""
        if not self._part.parallel.decodes_together:
            return self.final_latents(state).unsqueeze(0)
        tail = self._part.parallel.pp - 1
        latents = self.final_latents(state).unsqueeze(0) if self._part.is_tail else torch.empty(state.latent_shape)
        return self._part.axis("pp").broadcast(latents.to(self._device), tail)

    # Facts of a request.

    def _experts_used(self, state: WanState) -> list[int]:
        return sorted({step.expert for step in state.steps})

    def _keeps_first_frame(self, state: WanState) -> bool:
        """TI2V with an image: the first latent frame is given, not denoised."""
        return self._spec.kind == "ti2v" and state.job.has_image

    def _with_first_frame(self, state: WanState, latents: torch.Tensor) -> torch.Tensor:
        """The latents with the given first frame put back (diffusers' arithmetic, so that bits agree)."""
        if not self._keeps_first_frame(state):
            return latents
        mask = torch.ones(1, 1, *latents.shape[2:], device=latents.device)
        mask[:, :, 0] = 0
        return (1 - mask) * state.conditioning["first_frame"] + mask * latents

    def _of_step(self, state: WanState, name: str, step: int) -> torch.Tensor:
        """Time embedding or modulation of a step: [1, ...], or with `expand_timesteps` [1, s or 1, ...]."""
        expert, position = state.steps[step].expert, state.position_in_expert(step)
        rows = state.conditioning[f"{name}.{expert}"][position]
        if self._spec.kind != "ti2v":
            return rows
        row = state.conditioning[f"row.{expert}"]
        if expert not in state.uniform:
            state.uniform[expert] = (row == 0).all(dim=1).tolist()
        if state.uniform[expert][position]:
            return rows[:1].unsqueeze(0)
        return rows[row[position, state.shards.own].long()].unsqueeze(0)


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


def _distinct_rows(rows: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places [slots] of the first rows that differ in any bit, and each row's number among them, uint8 [S]."""
    rows = rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int16)
    number = torch.full(rows.shape[:1], slots, dtype=torch.uint8, device=rows.device)
    places = torch.zeros(slots, dtype=torch.int64, device=rows.device)
    for slot in range(slots):
        left = (number == slots).nonzero()
        if not len(left):
            break
        places[slot] = left[0, 0]
        alike = (rows == rows[left[0, 0]]).all(dim=1)
        number[alike & (number == slots)] = slot
    else:
        if (number == slots).any():
            log.warning("The time embedding has more than %d distinct rows: bits may differ from diffusers'.", slots)
            number[number == slots] = 0
    return places, number
