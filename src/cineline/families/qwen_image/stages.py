"""Qwen-Image cut over stages: text encoder, blocks and the VAE's decoder are shared out; embedders are on the head, the
output projection on the tail.

Legend: S tokens of the picture, T of a prompt, D model width, K packed channels of a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from cineline.core.image import KeyFrames
from cineline.core.request import Branch, Job, Kind, VideoRequest, WorkItem
from cineline.families.double_stream import ATTENTION, OUTPUTS
from cineline.families.flow import FlowStages, FlowState, make_solver
from cineline.families.pipeline_parallel import StagePart
from cineline.families.qwen_image.prompts import DROPPED
from cineline.families.qwen_image.spec import QwenImageSpec, QwenJob
from cineline.families.qwen_image.vae import wan_config
from cineline.families.qwen_vl import QwenLayers
from cineline.families.tensor_parallel import share_linears
from cineline.families.wan_vae.costs import VaeCosts
from cineline.families.wan_vae.decoder import DecoderSlice, boundary_specs
from cineline.families.wan_vae.halves import VaeFiles
from cineline.schedule.words import Value
from cineline.transport.channel import TensorSpec
from cineline.weights.files import Shard, Weights
from cineline.weights.sources import open_source

COLUMNS = (*ATTENTION, "img_mlp.net.0.proj", "txt_mlp.net.0.proj")
ROWS = (*OUTPUTS, "img_mlp.net.2", "txt_mlp.net.2")
"""Linears whose outputs, and whose inputs, the ranks of a stage share (diffusers' `_tp_plan`)."""


class QwenImageStages(FlowStages):
    """One stage of a Qwen-Image model."""

    spec: QwenImageSpec

    def load(self, part: StagePart) -> int:
        spec = self.spec
        self._part, self._dtype = part, getattr(torch, part.config.dtype)
        self._tp = part.axis("tp")
        config = spec.configs["transformer"]
        self._rope = QwenEmbedRope(10000, list(config.get("axes_dims_rope", (16, 56, 56))), scale_rope=True)
        self._text = self._decoder = None
        if part.place.is_first_lane:
            costs = spec.costs(part.config.dtype, part.config.vae_dtype)
            encoder = spec.configs["text_encoder"]
            self._text = QwenLayers(
                spec.folder / "text_encoder", spec.variant, encoder, costs.text_layers, last_norm=True, part=part
            )
        self._model, read = self._transformer()
        vae = VaeFiles(wan_config(spec.configs["vae"]), lambda: Weights(open_source(spec.folder / "vae", spec.variant)))
        self._units = VaeCosts.of(vae.config)
        self._vae_dtype = getattr(torch, part.config.vae_dtype)
        if part.decodes:
            units, takes = part.cut.decoder, part.takes_latents
            self._decoder = DecoderSlice(vae, units, self._vae_dtype, part.device, takes)
        return read + sum(each.bytes_read for each in (self._text, self._decoder) if each)

    def _transformer(self) -> tuple[Any, int]:
        """Of the blocks this stage's, and on head and tail what stands before and after them; the bytes read."""
        spec, part = self.spec, self._part
        weights = Weights(open_source(spec.folder / "transformer", spec.variant))
        with torch.device("meta"):
            model = QwenImageTransformer2DModel.from_config(dict(spec.configs["transformer"]))
        weights.check_names(model.state_dict())
        layers = part.cut.blocks
        # Keyed by the block's number in the whole model, so that names stay the stored ones.
        model.transformer_blocks = nn.ModuleDict({str(layer): model.transformer_blocks[layer] for layer in layers})
        del model.pos_embed
        if not part.is_head:
            del model.time_text_embed, model.txt_norm, model.txt_in, model.img_in
        if not part.is_tail:
            del model.norm_out, model.proj_out
        weights.load(model, self._dtype, part.device, shards=self._share(model))
        return model, weights.bytes_read

    def _share(self, model: Any) -> dict[str, Shard]:
        """Have the ranks of the stage share its blocks' weights; the parts of tensors that are read."""
        shards: dict[str, Shard] = {}
        for layer, block in model.transformer_blocks.items() if self._tp.size > 1 else ():
            parts = share_linears(block, self._tp, COLUMNS, ROWS)
            block.attn.heads //= self._tp.size
            block.attn.inner_dim //= self._tp.size
            shards |= {f"transformer_blocks.{layer}.{name}": shard for name, shard in parts.items()}
        return shards

    def rehearsals(self) -> Iterable[tuple[Job, KeyFrames | None]]:
        """A few tokens and steps, with guidance."""
        side = 4 * self.spec.vae_scale
        small = VideoRequest(prompt="a rehearsal", height=side, width=side, num_inference_steps=2, guidance_scale=2)
        yield self.spec.resolve(small, 0), None

    # What a request is like.

    def solver(self, job: Job) -> Any:
        assert isinstance(job, QwenJob)  # `QwenImageSpec.resolve` makes no others
        config = self.spec.configs["scheduler"]
        levels = np.linspace(1.0, 1 / job.steps, job.steps) if job.sigmas is None else list(job.sigmas)
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(self.spec.tokens(job), *(config.get(name, value) for name, value in names.items()))
        return make_solver(config, levels, self._part.device, mu=mu)

    def noise(self, job: Job) -> Tensor:
        batch, channels, frames, rows, columns = self.spec.latent_shape(job)
        generator = torch.Generator("cpu").manual_seed(job.seed)
        drawn = randn_tensor((batch, frames, channels, rows, columns), generator=generator, dtype=self._dtype)
        packed: Tensor = QwenImagePipeline._pack_latents(drawn, batch, channels, rows, columns)
        return packed

    def latent_spec(self, job: Job) -> TensorSpec:
        return TensorSpec((1, self.spec.tokens(job), 4 * self.spec.latent_shape(job)[1]), self._dtype)

    def rotary(self, job: Job, branch: Branch) -> tuple[Tensor, Tensor]:
        assert isinstance(job, QwenJob)
        _, _, frames, rows, columns = self.spec.latent_shape(job)
        shapes = [[(frames, rows // 2, columns // 2)]]
        device = self._part.device
        both: tuple[Tensor, Tensor] = self._rope(shapes, max_txt_seq_len=job.text_rows(branch), device=device)
        return both

    def conditioning(self, state: FlowState) -> dict[str, TensorSpec]:
        assert isinstance(state.job, QwenJob)
        width = self.spec.costs("float32", "float32").width
        specs = {
            f"text.{branch.name.lower()}": TensorSpec((1, state.job.text_rows(branch), width), self._dtype)
            for branch in self._part.branches(state.job)
        }
        return specs | {"time": TensorSpec((state.job.steps, 1, width), self._dtype)}

    def handed_on(self, state: FlowState, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        assert isinstance(state.job, QwenJob)
        costs = self.spec.costs("float32", "float32")
        rows = state.job.text_rows(item.branch)
        match value:
            case Value.TEXT:
                return (TensorSpec((1, len(state.job.tokens[item.branch]), costs.encoder.width), self._dtype),)
            case Value.EMBEDDING:
                return (TensorSpec((1, rows, costs.encoder.width), self._dtype),)
            case Value.HIDDEN:
                tokens = self.spec.tokens(state.job)
                return tuple(TensorSpec((1, count, costs.width), self._dtype) for count in (tokens, rows))
            case _:
                shape, unit = self.spec.latent_shape(state.job), self._part.cut.decoder.start
                return boundary_specs(self._units, shape, item.number, unit, self._vae_dtype)

    # What a stage computes.

    def compute(self, state: FlowState, item: WorkItem, starts: bool, ends: bool) -> None:
        match item.kind:
            case Kind.TEXT:
                state.hidden = (self._encode_text(state, item, starts, ends),)
            case Kind.ENCODE if starts:
                state.conditioning = self._condition(state)
            case Kind.DENOISE:
                self._denoise(state, item, starts, ends)
            case Kind.DECODE:
                self._decode(state, item)

    def _encode_text(self, state: FlowState, item: WorkItem, starts: bool, ends: bool) -> Tensor:
        """A prompt's hidden states [1, T, width], at the end those that the transformer sees. Of one prompt nothing is
        padded, so that there is no mask."""
        assert self._text is not None and isinstance(state.job, QwenJob)
        tokens = state.job.tokens[item.branch]
        (states,) = (torch.tensor([tokens]),) if starts else state.take_hidden()
        states = self._text.run(states, None, starts)
        if item.branch is self._part.branches(state.job)[-1]:
            self._text.release()
        return states[:, DROPPED : DROPPED + state.job.text_rows(item.branch)].clone() if ends else states

    def _condition(self, state: FlowState) -> tuple[Tensor, ...]:
        """Projected prompts, and each step's time embedding by itself: a product's bits depend on its rows' number."""
        model, solver, made = self._model, state.solver, []
        for branch in self._part.branches(state.job):
            made.append(model.txt_in(model.txt_norm(self._everywhere(state, branch))))
        times = []
        for timestep in solver.timesteps:
            share = timestep.expand(1).to(self._dtype) / 1000
            times.append(model.time_text_embed(share.to(self._dtype), made[0]))
        state.texts.clear()
        return *made, torch.stack(times)

    def _everywhere(self, state: FlowState, branch: Branch) -> Tensor:
        """A prompt's embedding; the stage's first rank has it and hands it to the others."""
        (spec,) = self.handed_on(state, Value.EMBEDDING, WorkItem(Kind.TEXT, state.job.id, branch=branch))
        own = state.texts[branch] if self._part.place.is_first_lane else torch.empty(spec.shape, dtype=spec.dtype)
        return self._tp.broadcast(own.to(self._part.device))

    def _denoise(self, state: FlowState, item: WorkItem, starts: bool, ends: bool) -> None:
        """A forward for the item's branch: the picture's tokens and the prompt's, through this stage's blocks."""
        model, time = self._model, state.conditioned("time")[item.number]
        if starts:
            picture, text = model.img_in(state.latents), state.conditioned(f"text.{item.branch.name.lower()}")
        else:
            picture, text = state.take_hidden()
        for block in model.transformer_blocks.values():
            text, picture = block(
                hidden_states=picture,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=None,
                temb=time,
                image_rotary_emb=state.rotary[item.branch],
            )
        if ends:
            state.predictions[item.branch] = model.proj_out(model.norm_out(picture, time))
        else:
            state.hidden = picture, text

    def combined(self, state: FlowState) -> Tensor:
        """True guidance, as long for each token as the first branch's prediction (`QwenImagePipeline.__call__`)."""
        cond = state.predictions[Branch.COND]
        if Branch.UNCOND not in state.predictions:
            return cond
        uncond = state.predictions[Branch.UNCOND]
        both = uncond + state.job.guidance_scale * (cond - uncond)
        length, wanted = torch.norm(both, dim=-1, keepdim=True), torch.norm(cond, dim=-1, keepdim=True)
        rescaled: Tensor = both * (wanted / length)
        return rescaled

    def final(self, state: FlowState) -> Tensor:
        return self._unpacked(state)[0].float()

    def _unpacked(self, state: FlowState) -> Tensor:
        """The latents, [1, C, 1, H', W']."""
        job, scale = state.job, self.spec.vae_scale
        latents: Tensor = QwenImagePipeline._unpack_latents(state.latents, job.height, job.width, scale)
        return latents

    def _decode(self, state: FlowState, item: WorkItem) -> None:
        assert self._decoder is not None
        latents = self._unpacked(state) if self._part.takes_latents else None
        state.hidden = self._decoder.run(self._decoder.start(latents), item.number, state.take_hidden())
