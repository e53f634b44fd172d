"""HunyuanVideo 1.5 cut over stages: the large text encoder, blocks and the VAE's decoder are shared out; embedders and
the small text encoder are on the head, the output projection on the tail.

A prompt is refined for each step, so that the head keeps it: its tokens, those of the words that are to be written and
of an image that there is none of are the second stream. Legend: S tokens of the video, C of that stream (1985),
D model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from cineline.core.image import KeyFrames
from cineline.core.request import Branch, Job, Kind, VideoRequest, WorkItem
from cineline.families.double_stream import ATTENTION, OUTPUTS
from cineline.families.flow import FlowStages, FlowState, make_solver
from cineline.families.guidance import combine
from cineline.families.hunyuan_video.constants import CONTEXT, DROPPED, IMAGE_ROWS, TEXT_ROWS
from cineline.families.hunyuan_video.decoder import HunyuanDecoder
from cineline.families.hunyuan_video.spec import HunyuanJob, HunyuanVideoSpec
from cineline.families.hunyuan_video.text import Conversation, Glyphs
from cineline.families.pipeline_parallel import StagePart
from cineline.families.qwen_vl import QwenLayers
from cineline.families.tensor_parallel import share_linears
from cineline.schedule.words import Value
from cineline.transport.channel import TensorSpec
from cineline.weights.files import Shard, Weights
from cineline.weights.sources import open_source

COLUMNS = (*ATTENTION, "ff.net.0.proj", "ff_context.net.0.proj")
ROWS = (*OUTPUTS, "ff.net.2", "ff_context.net.2")
"""Linears whose outputs, and whose inputs, the ranks of a stage share."""


class Prompt(NamedTuple):
    """What the head keeps of a branch's prompt.

    Attributes:
        states, mask: the encoder's [1, 1000, width], and which of them are its tokens'.
        others: embedded tokens of image and glyphs, [1, 985, D].
        order: of all tokens as blocks see them, those that count first.
        written: which of them, in that order, are no zeros, [1, C, 1].
    """

    states: Tensor
    mask: Tensor
    others: Tensor
    order: Tensor
    written: Tensor


@dataclass
class HunyuanState(FlowState):
    """One request on one stage.

    Attributes:
        masks: on the head, of the branches' prompts until they are used, int64 [1, 1108]. prompts: then what it keeps.
    """

    masks: dict[Branch, Tensor] = field(default_factory=dict)
    prompts: dict[Branch, Prompt] = field(default_factory=dict)


class HunyuanVideoStages(FlowStages):
    """One stage of a HunyuanVideo 1.5 model."""

    spec: HunyuanVideoSpec
    state_class = HunyuanState

    def load(self, part: StagePart) -> int:
        spec = self.spec
        self._part, self._dtype, self._tp = part, getattr(torch, part.config.dtype), part.axis("tp")
        self._costs = spec.costs(part.config.dtype, part.config.vae_dtype)
        leads_stage = part.place.is_first_lane
        self._conversation = self._glyphs = self._text = None
        if leads_stage and part.is_head:  # first, so that a tokenizer that is none is found before weights are read
            self._conversation = Conversation(spec)
            self._glyphs = Glyphs(spec, self._dtype, part.device)
        if leads_stage:
            encoder, layers = spec.configs["text_encoder"], self._costs.text_layers
            self._text = QwenLayers(spec.folder / "text_encoder", spec.variant, encoder, layers, False, part)
        self._model, read = self._transformer()
        self._decoder = HunyuanDecoder(spec, part) if part.decodes else None
        return read + sum(each.bytes_read for each in (self._glyphs, self._text, self._decoder) if each)

    def _transformer(self) -> tuple[Any, int]:
        """Of the blocks this stage's, and on head and tail what stands before and after them; the bytes read."""
        spec, part = self.spec, self._part
        weights = Weights(open_source(spec.folder / "transformer", spec.variant))
        with torch.device("meta"):
            model = HunyuanVideo15Transformer3DModel.from_config(dict(spec.configs["transformer"]))
        weights.check_names(model.state_dict())
        # Keyed by the block's number in the whole model, so that names stay the stored ones.
        blocks = {str(layer): model.transformer_blocks[layer] for layer in part.cut.blocks}
        model.transformer_blocks = nn.ModuleDict(blocks)
        self._rope = model.rope
        if not part.is_head:
            del model.x_embedder, model.image_embedder, model.context_embedder, model.context_embedder_2
            del model.time_embed, model.cond_type_embed
        if not part.is_tail:
            del model.norm_out, model.proj_out
        shards: dict[str, Shard] = {}
        for layer, block in blocks.items() if self._tp.size > 1 else ():
            parts = share_linears(block, self._tp, COLUMNS, ROWS)
            block.attn.heads //= self._tp.size
            shards |= {f"transformer_blocks.{layer}.{name}": shard for name, shard in parts.items()}
        weights.load(model, self._dtype, part.device, shards=shards)
        return model, weights.bytes_read

    def rehearsals(self) -> Iterable[tuple[Job, KeyFrames | None]]:
        """A few tokens and steps, with guidance."""
        side = 2 * self.spec.vae_scale * self.spec.patch[1]
        fields: dict[str, Any] = {"height": side, "width": side, "num_frames": 5, "guidance_scale": 2}
        yield self.spec.resolve(VideoRequest(prompt='a "rehearsal"', num_inference_steps=2, **fields), 0), None

    # What a request is like.

    def solver(self, job: Job) -> Any:
        assert isinstance(job, HunyuanJob)  # `HunyuanVideoSpec.resolve` makes no others
        shift = {} if job.flow_shift is None else {"shift": job.flow_shift}
        levels = np.linspace(1.0, 0.0, job.steps + 1)[:-1] if job.sigmas is None else list(job.sigmas)
        return make_solver({**self.spec.configs["scheduler"], **shift}, levels, self._part.device)

    def noise(self, job: Job) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(job.seed)
        drawn: Tensor = randn_tensor(self.spec.latent_shape(job), generator=generator, dtype=self._dtype)
        return drawn

    def latent_spec(self, job: Job) -> TensorSpec:
        return TensorSpec(self.spec.latent_shape(job), self._dtype)

    def rotary(self, job: Job, branch: Branch) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = self._rope(torch.empty(self.spec.latent_shape(job), device=self._part.device))
        return both

    def conditioning(self, state: FlowState) -> dict[str, TensorSpec]:
        masks = {
            f"mask.{branch.name.lower()}": TensorSpec((1, CONTEXT), torch.bool)
            for branch in self._part.branches(state.job)
        }
        return masks | {"time": TensorSpec((state.job.steps, 1, self._costs.width), self._dtype)}

    def handed_on(self, state: FlowState, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        width = self._costs.encoder.width
        match value:
            case Value.TEXT:
                rows = TEXT_ROWS + DROPPED
                return TensorSpec((1, rows, width), self._dtype), TensorSpec((1, rows), torch.int64)
            case Value.EMBEDDING:
                return (TensorSpec((1, TEXT_ROWS, width), self._dtype),)
            case Value.HIDDEN:
                counts = self.spec.tokens(state.job), CONTEXT
                return tuple(TensorSpec((1, count, self._costs.width), self._dtype) for count in counts)
            case _:
                start = self._part.cut.decoder.start
                shape = self._costs.vae.boundary(start, self.spec.latent_shape(state.job))
                return (TensorSpec(shape, getattr(torch, self._part.config.vae_dtype)),)

    # What a stage computes.

    def compute(self, state: FlowState, item: WorkItem, starts: bool, ends: bool) -> None:
        assert isinstance(state, HunyuanState)
        match item.kind:
            case Kind.TEXT:
                self._encode_text(state, item, starts, ends)
            case Kind.ENCODE if starts:
                state.conditioning = self._condition(state)
            case Kind.DENOISE:
                self._denoise(state, item, starts, ends)
            case Kind.DECODE:
                assert self._decoder is not None
                (came,) = (state.latents,) if self._part.takes_latents else state.take_hidden()
                assert came is not None
                state.hidden = (self._decoder.run(came),)

    def _encode_text(self, state: HunyuanState, item: WorkItem, starts: bool, ends: bool) -> None:
        assert self._text is not None
        if starts:
            assert self._conversation is not None
            states, mask = self._conversation(state.prompt(item.branch))
            mask = mask.to(self._part.device)
            state.masks[item.branch] = mask
        else:
            states, mask = state.take_hidden()
        states = self._text.run(states, mask, starts)
        if item.branch is self._part.branches(state.job)[-1]:
            self._text.release()
        state.hidden = (states[:, DROPPED:].clone(),) if ends else (states, mask.clone())

    def _condition(self, state: HunyuanState) -> tuple[Tensor, ...]:
        """Which tokens of the second stream count, and each step's time embedding."""
        branches = self._part.branches(state.job)
        state.prompts = {branch: self._prompt(state, branch) for branch in branches}
        times = [self._model.time_embed(self._time(state, step)) for step in range(state.job.steps)]
        masks = [self._counting(state.prompts[branch]) for branch in branches]
        state.texts.clear()
        state.masks.clear()
        return *masks, torch.stack(times)

    def _time(self, state: HunyuanState, step: int) -> Tensor:
        timestep: Tensor = state.solver.timesteps[step].expand(1).to(self._dtype)
        return timestep

    def _prompt(self, state: HunyuanState, branch: Branch) -> Prompt:
        """As `HunyuanVideo15Transformer3DModel.forward` embeds and orders it, but for what a step's time is in."""
        model, device = self._model, self._part.device
        (spec,) = self.handed_on(state, Value.EMBEDDING, WorkItem(Kind.TEXT, state.job.id, branch=branch))
        glyphs = torch.empty(1, CONTEXT - TEXT_ROWS - IMAGE_ROWS, self._glyph_width, dtype=self._dtype, device=device)
        states = torch.empty(spec.shape, dtype=spec.dtype, device=device)
        counts = torch.empty(1, CONTEXT - IMAGE_ROWS, dtype=torch.int64, device=device)
        if self._part.place.is_first_lane:
            assert self._glyphs is not None
            states = state.texts[branch].clone()
            glyphs, written = self._glyphs(state.prompt(branch))
            counts = torch.cat([written, state.masks[branch][:, DROPPED:]], dim=1)
        states, glyphs, counts = (self._tp.broadcast(one.contiguous()) for one in (states, glyphs, counts))
        glyphs = model.context_embedder_2(glyphs)
        glyphs = glyphs + model.cond_type_embed(torch.ones_like(glyphs[:, :, 0], dtype=torch.long))
        nothing = torch.zeros(1, IMAGE_ROWS, self._image_width, dtype=self._dtype, device=device)
        image = model.image_embedder(nothing) * 0.0
        image = image + model.cond_type_embed(2 * torch.ones_like(image[:, :, 0], dtype=torch.long))
        valid = torch.cat([counts.new_zeros(1, IMAGE_ROWS), counts], dim=1)[0].bool()
        order = torch.cat([valid.nonzero()[:, 0], (~valid).nonzero()[:, 0]])
        kept = valid.clone()
        kept[:IMAGE_ROWS] = True  # an image's tokens that do not count are no zeros
        mask = counts[:, CONTEXT - TEXT_ROWS - IMAGE_ROWS :].to(self._dtype)
        return Prompt(states, mask, torch.cat([image, glyphs], dim=1), order, kept[order].view(1, -1, 1))

    @staticmethod
    def _counting(prompt: Prompt) -> Tensor:
        """Of the tokens in their order those that count, bool [1, C]."""
        return prompt.written[:, :, 0] & (prompt.order >= IMAGE_ROWS)

    @property
    def _glyph_width(self) -> int:
        return int(self.spec.configs["transformer"].get("text_embed_2_dim", 1472))

    @property
    def _image_width(self) -> int:
        return int(self.spec.configs["transformer"].get("image_embed_dim", 1152))

    def _context(self, state: HunyuanState, item: WorkItem) -> Tensor:
        """The second stream [1, C, D], with the prompt refined for the step."""
        model, prompt = self._model, state.prompts[item.branch]
        text = model.context_embedder(prompt.states, self._time(state, item.number), prompt.mask)
        text = text + model.cond_type_embed(torch.zeros_like(text[:, :, 0], dtype=torch.long))
        whole = torch.cat([prompt.others, text], dim=1)[:, prompt.order]
        return whole.masked_fill(~prompt.written, 0)

    def _denoise(self, state: HunyuanState, item: WorkItem, starts: bool, ends: bool) -> None:
        """A forward for the item's branch, both streams through this stage's blocks."""
        model, time = self._model, state.conditioned("time")[item.number]
        if starts:
            assert state.latents is not None
            nothing = torch.zeros_like(state.latents)
            video = model.x_embedder(torch.cat([state.latents, nothing, nothing[:, :1]], dim=1))
            context = self._context(state, item)
        else:
            video, context = state.take_hidden()
        mask = state.conditioned(f"mask.{item.branch.name.lower()}")
        for block in model.transformer_blocks.values():
            video, context = block(video, context, time, mask, state.rotary[item.branch])
        if ends:
            state.predictions[item.branch] = self._unpatchified(state, model.proj_out(model.norm_out(video, time)))
        else:
            state.hidden = video, context

    def _unpatchified(self, state: HunyuanState, patches: Tensor) -> Tensor:
        """[1, C, F', H', W'], as the end of diffusers' forward."""
        (frames, rows, columns), (deep, high, wide) = self.spec.latent_shape(state.job)[2:], self.spec.patch
        grid = frames // deep, rows // high, columns // wide
        patches = patches.reshape(1, *grid, -1, deep, high, wide).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def combined(self, state: FlowState) -> Tensor:
        return combine(state.predictions, state.job.guidance_scale)

    def final(self, state: FlowState) -> Tensor:
        assert state.latents is not None
        return state.latents[0].float()

    def end_denoising(self, state: FlowState) -> None:
        assert isinstance(state, HunyuanState)
        super().end_denoising(state)
        state.prompts.clear()
