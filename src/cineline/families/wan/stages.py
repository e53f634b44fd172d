"""Wan cut over stages: which of its parts does what for an item.

The head holds patch and condition embedders, tokenizer and VAE encoder, the tail the output projection; the blocks of
all experts, the text encoder's layers and the VAE decoder's units are shared out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from cineline.core.image import KeyFrames
from cineline.core.request import Job, Kind, VideoRequest, WorkItem
from cineline.families import snapshot
from cineline.families.guidance import combine
from cineline.families.part import Part
from cineline.families.pipeline_parallel import PipelineParallelMixin, StagePart
from cineline.families.snapshot import copied
from cineline.families.solver import contents, export_solver, history_bytes, restore_solver
from cineline.families.wan import residuals
from cineline.families.wan.conditioning import Conditioner
from cineline.families.wan.constants import TEXT_TOKENS
from cineline.families.wan.decoding import DecoderPart
from cineline.families.wan.denoise import Step, make_solver, make_steps, noise_generator, take_step
from cineline.families.wan.experts import Experts
from cineline.families.wan.job import WanJob
from cineline.families.wan.mag_cache import skipped_by
from cineline.families.wan.preview import Previewer
from cineline.families.wan.schedules import solver_of
from cineline.families.wan.sequence_parallel import TokenShards
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.state import WanState
from cineline.families.wan.text import TextPart
from cineline.schedule.words import Value
from cineline.transport.channel import TensorSpec

REHEARSED_STEPS = 6
"""Of each expert as many as the highest order of a solver, 3."""


class WanStages(PipelineParallelMixin[WanState]):
    """One stage of a Wan model: its parts of text encoder, experts, image encoder and decoder."""

    spec: WanSpec

    def load(self, part: StagePart) -> int:
        spec = self.spec
        self._part, self._device, self._dtype = part, part.device, getattr(torch, part.config.dtype)
        rope = spec.transformer["attention_head_dim"], spec.patch, spec.transformer["rope_max_seq_len"]
        self._rope = WanRotaryPosEmbed(*rope).to(self._device)
        text = TextPart(spec, part)  # first, so that a tokenizer that is none is found before large weights are read
        self._experts = Experts(spec, part)
        self._conditioner = Conditioner(spec, part, self._experts)
        self._decoder = DecoderPart(spec, part)
        self._previewer = Previewer(spec, part)
        self._parts: Mapping[Kind, Part[WanState]] = {
            Kind.TEXT: text,
            Kind.ENCODE: self._conditioner,
            Kind.DENOISE: self._experts,
            Kind.DECODE: self._decoder,
        }
        return sum(each.bytes_read for each in self._parts.values())

    def admit(self, job: Job, image: KeyFrames | None) -> WanState:
        assert isinstance(job, WanJob)  # `WanSpec.resolve` makes no others
        solver, shape = self._solver(job), self.spec.latent_shape(job)
        steps = make_steps(solver, job)
        if job.cache is not None:  # the engine has no solver, and could only guess how many steps each expert has
            job = replace(job, skipped=skipped_by(job, [step.expert for step in steps]))
        state = WanState(job, image=image, steps=steps, latent_shape=shape)
        state.keeps_first_frame = self.spec.kind == "ti2v" and job.has_image
        cos, sin = self._rope(torch.empty(shape, device="meta"))
        state.tokens = cos.shape[1]
        state.shards = TokenShards(state.tokens, self._part.axis("ring"), self._part.axis("ulysses"))
        state.rotary = state.shards.cut(cos), state.shards.cut(sin)
        state.names = tuple(self._conditioner.specs(state))
        self._conditioner.admit(state)
        stage, groups = self._part.place.pp, self._experts.groups
        ends = {group.stop - 1 for group in groups}
        if stage in ends:
            state.solver, state.fresh = solver, contents(solver)
        if stage in ends | {group.start for group in groups}:
            generator = torch.Generator("cpu").manual_seed(job.seed)
            state.latents = randn_tensor(shape, generator=generator, device=self._device, dtype=torch.float32)
        return state

    def _solver(self, job: WanJob) -> Any:
        return make_solver(*solver_of(self.spec, job.solver), job, self._device)

    def rehearsals(self) -> Iterable[tuple[Job, KeyFrames | None]]:
        """A few tokens, as many steps as solvers have orders, both experts, three chunks, and an image."""
        spec, (height, width) = self.spec, self.spec.grid
        fields: dict[str, Any] = {
            "height": 2 * height,
            "width": 2 * width,
            "num_frames": 9,
            "num_inference_steps": REHEARSED_STEPS,
        }
        if len(spec.experts) > 1:
            fields |= {"boundary_ratio": 0.5, "flow_shift": 1.0}
        image = Image.new("RGB", (fields["width"], fields["height"]))
        given = None if spec.kind == "t2v" else image
        last = image if spec.pictures == 2 else None
        request = VideoRequest(prompt="a rehearsal", image=given, last_image=last, **fields)
        yield spec.resolve(request, 0), None if given is None else KeyFrames(given, last)

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
                return self._decoder.specs(state, item)

    def compute(self, state: WanState, item: WorkItem, starts: bool, ends: bool) -> None:
        self._parts[item.kind].compute(state, item, starts, ends)

    def finish(self, state: WanState, item: WorkItem) -> None:
        step = state.steps[item.number]
        prediction = combine(state.predictions, step.guidance)
        assert state.latents is not None
        if state.job.previews(item):
            state.preview = self._outcome(state, prediction, step)
        generator = noise_generator(state.job.seed, item.number)
        state.latents = take_step(state.solver, prediction, step.timestep, state.latents, generator)
        state.predictions.clear()

    def answer(self, state: WanState, item: WorkItem) -> torch.Tensor | None:
        if item.kind is Kind.DECODE:
            (frames,) = state.take_hidden()
            return frames
        if state.preview is not None:
            picture, state.preview = self._previewer.picture(state.preview), None
            return picture
        if not state.job.ends_denoising(item):
            return None
        return residuals.measured(state) if state.job.calibrates else state.final_latents()[0]

    def _outcome(self, state: WanState, prediction: torch.Tensor, step: Step) -> torch.Tensor:
        """Latents without noise, if the flow that the step predicts went on straight (x - sigma v)."""
        assert state.latents is not None
        sigma = step.timestep.float() / self.spec.scheduler.get("num_train_timesteps", 1000)
        return state.with_first_frame(state.latents - sigma * prediction.float())

    def end_denoising(self, state: WanState) -> None:
        state.end_denoising()

    def export(self, state: WanState) -> Mapping[str, Any]:
        solver = state.solver and export_solver(state.solver, state.fresh)
        return {"latents": copied(state.latents), "solver": solver, "decoding": self._decoder.export(state)}

    def restore(self, state: WanState, exported: Mapping[str, Any]) -> None:
        state.latents = copied(exported["latents"])
        if state.solver and exported["solver"] is not None:  # a head needs the latents alone
            state.solver = self._solver(state.job)
            state.fresh = contents(state.solver)
            restore_solver(state.solver, exported["solver"])
        self._decoder.restore(state, exported["decoding"])
