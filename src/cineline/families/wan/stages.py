"""Wan 2.2 cut over stages: which of its parts does what for an item.

The head holds patch and condition embedders, tokenizer and VAE encoder, the tail the output projection; the blocks of
all experts, the text encoder's layers and the VAE decoder's units are shared out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from cineline.core.request import Branch, Job, Kind, WorkItem
from cineline.families import snapshot
from cineline.families.guidance import combine
from cineline.families.pipeline_parallel import PipelineParallelMixin, StagePart
from cineline.families.snapshot import copied
from cineline.families.wan.conditioning import Conditioner
from cineline.families.wan.constants import TEXT_TOKENS
from cineline.families.wan.costs.vae import VaeCosts
from cineline.families.wan.decoder import Decoder, DecoderSlice, TiledDecoder, boundary_specs
from cineline.families.wan.denoise import (
    export_solver,
    history_bytes,
    make_solver,
    make_steps,
    restore_solver,
)
from cineline.families.wan.experts import Experts
from cineline.families.wan.job import WanJob
from cineline.families.wan.rows import RowDecoder
from cineline.families.wan.sequence_parallel import TokenShards
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.state import WanState
from cineline.families.wan.text import TextSlice, Tokenizer
from cineline.families.wan.vae import ImageEncoder
from cineline.schedule.words import Value
from cineline.transport.channel import TensorSpec


class WanStages(PipelineParallelMixin[WanState]):
    """One stage of a Wan 2.2 model: its parts of text encoder, experts, image encoder and decoder."""

    spec: WanSpec

    def __init__(self, spec: WanSpec) -> None:
        super().__init__(spec)
        self._vae = VaeCosts.of(spec.vae)

    def load(self, part: StagePart) -> int:
        spec, config, first_lane = self.spec, part.config, part.place.is_first_lane
        self._part, self._device = part, part.device
        self._dtype, self._vae_dtype = getattr(torch, config.dtype), getattr(torch, config.vae_dtype)
        rope = spec.transformer["attention_head_dim"], spec.patch, spec.transformer["rope_max_seq_len"]
        self._rope = WanRotaryPosEmbed(*rope).to(self._device)
        self._experts = Experts(spec, part)
        self._text = self._images = self._decoder = None
        if first_lane:
            where = part.is_head, part.is_tail, self._dtype, self._device, config.text_encoder
            self._text = TextSlice(spec.folder, part.cut.text, *where)
        if first_lane and part.is_head:
            self._tokenizer = Tokenizer(spec.folder)
        if first_lane and part.is_head and spec.kind != "t2v":
            self._images = ImageEncoder(spec.folder, self._vae_dtype, self._device)
        if part.decodes:
            self._decoder = self._load_decoder()
        self._conditioner = Conditioner(spec, part, self._experts, self._images)
        parts = self._experts, self._text, self._images, self._decoder
        return sum(each.bytes_read for each in parts if each is not None)

    def _load_decoder(self) -> Decoder:
        folder, part, dtype, device = self.spec.folder, self._part, self._vae_dtype, self._device
        if part.parallel.vae_decode == "rows":
            return RowDecoder(folder, dtype, device, part.axis("pp"))
        if part.parallel.vae_decode == "tiled":
            return TiledDecoder(folder, dtype, device)
        return DecoderSlice(folder, part.cut.decoder, dtype, device, part.takes_latents)

    def admit(self, job: Job, image: Image.Image | None) -> WanState:
        assert isinstance(job, WanJob)  # `WanSpec.resolve` makes no others
        solver, shape = self._solver(job), self.spec.latent_shape(job)
        state = WanState(job, image=image, steps=make_steps(solver, job), latent_shape=shape)
        state.keeps_first_frame = self.spec.kind == "ti2v" and job.has_image
        cos, sin = self._rope(torch.empty(shape, device="meta"))
        state.tokens = cos.shape[1]
        state.shards = TokenShards(state.tokens, self._part.axis("ring"), self._part.axis("ulysses"))
        state.rotary = state.shards.cut(cos), state.shards.cut(sin)
        state.names = tuple(self._conditioner.specs(state))
        stage, groups = self._part.place.pp, self._experts.groups
        ends = {group.stop - 1 for group in groups}
        if stage in ends:
            state.solver = solver
        if stage in ends | {group.start for group in groups}:
            generator = torch.Generator("cpu").manual_seed(job.seed)
            state.latents = randn_tensor(shape, generator=generator, device=self._device, dtype=torch.float32)
        return state

    def _solver(self, job: WanJob) -> Any:
        return make_solver(self.spec.scheduler_class, self.spec.scheduler, job, self._device)

    def expert(self, state: WanState, step: int) -> int:
        return state.steps[step].expert

    def specs(self, state: WanState, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        latents = TensorSpec(state.latent_shape, torch.float32)
        match value:
            case Value.TEXT:
                return self._conditioner.embedding, TensorSpec((1, TEXT_TOKENS), torch.int64)
            case Value.EMBEDDING:
                return (self._conditioner.embedding,)
            case Value.CONDITIONING:
                return tuple(self._conditioner.specs(state).values())
            case Value.HIDDEN:
                heads, size = (self.spec.transformer[name] for name in ("num_attention_heads", "attention_head_dim"))
                own = state.shards.own
                return (TensorSpec((1, own.stop - own.start, heads * size), self._dtype),)
            case Value.PREDICTION:
                return (TensorSpec(state.latent_shape, self._dtype),)
            case Value.LATENTS:
                return (latents,)
            case Value.HISTORY:
                solver = state.solver or self._solver(state.job)
                return (snapshot.spec_of(latents.nbytes + history_bytes(solver, latents.nbytes)),)
            case Value.CHUNK:
                units = self._part.cut.decoder
                return boundary_specs(self._vae, state.latent_shape, item.number, units.start, self._vae_dtype)

    def compute(self, state: WanState, item: WorkItem, starts: bool, ends: bool) -> None:
        match item.kind:
            case Kind.TEXT:
                self._encode_text(state, item.branch, starts, ends)
            case Kind.ENCODE if starts:
                state.conditioning = self._conditioner.make(state)
            case Kind.DENOISE:
                (hidden,) = (self._experts.embed(state, item.number),) if starts else state.take_hidden()
                hidden = self._experts.run(state, item.number, item.branch, hidden)
                if ends:
                    state.predictions[item.branch] = self._experts.predict(state, item.number, hidden)
                else:
                    state.hidden = (hidden,)
            case Kind.DECODE:
                self._decode(state, item.number)

    def _encode_text(self, state: WanState, branch: Branch, starts: bool, ends: bool) -> None:
        """A prompt through this stage's layers of the encoder; behind the last ones it is an embedding."""
        assert self._text is not None
        job = state.job
        prompt = job.prompt if branch is Branch.COND else job.negative_prompt
        states, mask = self._tokenizer(prompt) if starts else state.take_hidden()
        states = self._text.run(states, mask).to(self._device)
        if branch is self._part.branches(job)[-1]:
            self._text.release()
        state.hidden = (states,) if ends else (states, mask.to(self._device))

    def finish(self, state: WanState, item: WorkItem) -> None:
        step = state.steps[item.number]
        prediction = combine(state.predictions, step.guidance)
        state.latents = state.solver.step(prediction, step.timestep, state.latents, return_dict=False)[0]
        state.predictions.clear()

    def answer(self, state: WanState, item: WorkItem) -> torch.Tensor | None:
        if item.kind is Kind.DECODE:
            (frames,) = state.take_hidden()
            return frames
        return self._final_latents(state)[0] if state.job.ends_denoising(item) else None

    def end_denoising(self, state: WanState) -> None:
        state.end_denoising()

    def export(self, state: WanState) -> Mapping[str, Any]:
        solver = state.solver and export_solver(state.solver, self._solver(state.job))
        decoding = self._decoder.export(state.decoding) if self._decoder and state.decoding is not None else None
        return {"latents": copied(state.latents), "solver": solver, "decoding": decoding}

    def restore(self, state: WanState, exported: Mapping[str, Any]) -> None:
        state.latents = copied(exported["latents"])
        if exported["solver"] is not None:
            state.solver = self._solver(state.job)
            restore_solver(state.solver, exported["solver"])
        if exported["decoding"] is not None:
            assert self._decoder is not None
            state.decoding = self._decoder.restore(exported["decoding"])

    def _decode(self, state: WanState, chunk: int) -> None:
        """A latent frame through this rank's part of the decoder, which begins with the final latents."""
        assert self._decoder is not None
        if state.decoding is None:
            state.decoding = self._decoder.start(self._latents_to_decode(state) if self._part.takes_latents else None)
        state.hidden = self._decoder.run(state.decoding, chunk, state.take_hidden())

    def _latents_to_decode(self, state: WanState) -> torch.Tensor:
        """Final latents [1, C, F', H', W'], where a decode begins; by rows that is on every stage."""
        if not self._part.parallel.decodes_together:
            return self._final_latents(state)
        tail = self._part.parallel.pp - 1
        latents = self._final_latents(state) if self._part.is_tail else torch.empty(state.latent_shape)
        return self._part.axis("pp").broadcast(latents.to(self._device), tail)

    def _final_latents(self, state: WanState) -> torch.Tensor:
        """What the user gets, float32 [1, C, F', H', W']."""
        assert state.latents is not None
        return state.with_first_frame(state.latents).float()
