"""The transformers, cut: what a rank holds of every expert, from diffusers' own modules, and a forward through it.

Legend: S tokens, s this rank's, D model width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from cineline.core.request import Branch, WorkItem
from cineline.families.pipeline_parallel import StagePart
from cineline.families.wan import residuals
from cineline.families.wan.lora_keys import adapters
from cineline.families.wan.lora_runtime import LorasBeside
from cineline.families.wan.sequence_parallel import ShardedAttention
from cineline.families.wan.spec import WanSpec
from cineline.families.wan.state import WanState, text_name
from cineline.families.wan.tensor_parallel import shard_block
from cineline.families.wan.weights import weights_of
from cineline.weights.files import Shard


class Experts:
    """A rank's blocks of every expert that its stage runs, and what stands before and after them.

    The condition embedders of all experts are on the line's head, which embeds for every stage.

    Attributes:
        models: diffusers' modules, of each expert what is here.
        groups: by expert, the stages that run its steps.
        bytes_read: of the weights.
    """

    def __init__(self, spec: WanSpec, part: StagePart) -> None:
        self._spec, self._part = spec, part
        self._dtype = getattr(torch, part.config.dtype)
        self._ring, self._ulysses, self._tp = (part.axis(name) for name in ("ring", "ulysses", "tp"))
        self._beside = LorasBeside(self._tp)
        self.groups = [part.parallel.route(expert) for expert in range(len(spec.experts))]
        self.bytes_read = 0
        self.models = [self._load(expert) for expert in range(len(spec.experts))]

    def _load(self, expert: int) -> Any:
        name = self._spec.experts[expert]
        loras = adapters(self._spec, name)
        in_weights = list(loras.values()) if self._spec.lora_mode == "merge" else []
        weights = weights_of(self._spec.component(name), in_weights)
        with torch.device("meta"):
            model = WanTransformer3DModel.from_config(self._spec.transformer)
        weights.check_names(model.state_dict(), ignored=model._keys_to_ignore_on_load_unexpected)
        stage, group = self._part.place.pp, self.groups[expert]
        layers = self._part.cut.blocks if stage in group else range(0)
        # Keyed by the block's number in the whole model, so that names stay the stored ones.
        model.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in layers})
        if not self._part.is_head:
            del model.condition_embedder
        if stage not in (group.start, group.stop - 1):  # which embeds where steps are skipped
            del model.patch_embedding
        if stage != group.stop - 1:
            del model.norm_out, model.proj_out, model.scale_shift_table
        del model.rope
        shards = self._share(model)
        weights.load(model, self._dtype, self._part.device, fp32=model._keep_in_fp32_modules, shards=shards)
        if self._spec.lora_mode == "runtime":
            self._beside.attach(model, loras, shards)
        self.bytes_read += weights.bytes_read + sum(lora.bytes_read for lora in loras.values())
        return model

    def _share(self, model: Any) -> dict[str, Shard]:
        """Have the ranks of the stage share tokens and weights of its blocks; the parts of tensors that are read."""
        shards: dict[str, Shard] = {}
        for layer, block in model.blocks.items():
            if self._ring.size * self._ulysses.size > 1:
                block.attn1.processor = ShardedAttention(self._ring, self._ulysses)
            if self._tp.size > 1:
                parts = shard_block(block, self._tp)
                shards |= {f"blocks.{layer}.{name}": shard for name, shard in parts.items()}
        return shards

    def compute(self, state: WanState, item: WorkItem, starts: bool, ends: bool) -> None:
        """A forward for the item's branch, from the latents to its prediction."""
        self.take_turn(state)
        if item.number in state.job.skipped:
            hidden = residuals.add(state, item, self.embed(state, item.number))
        else:
            (before,) = (self.embed(state, item.number),) if starts else state.take_hidden()
            hidden = self.run(state, item.number, item.branch, before)
            if ends and residuals.are_kept(state, item.number):
                residuals.keep(state, item, before if starts else self.embed(state, item.number), hidden)
        if ends:
            state.predictions[item.branch] = self.predict(state, item.number, hidden)
        else:
            state.hidden = (hidden,)

    def take_turn(self, state: WanState) -> None:
        """Until the next one's turn the modules have this request's LoRAs."""
        self._beside.use(state.job)

    def embed(self, state: WanState, step: int) -> Tensor:
        """The latents as hidden states [1, s, D] before the first block."""
        assert state.latents is not None
        latents = state.with_first_frame(state.latents)
        beside = state.conditioned("condition") if "condition" in state.names else state.beside
        if beside is not None:
            latents = torch.cat([latents, beside], dim=1)
        hidden = self.models[state.steps[step].expert].patch_embedding(latents.to(self._dtype))
        own: Tensor = state.shards.cut(hidden.flatten(2).transpose(1, 2)).contiguous()
        return own

    def run(self, state: WanState, step: int, branch: Branch, hidden: Tensor) -> Tensor:
        """Hidden states [1, s, D] through this stage's blocks."""
        expert = state.steps[step].expert
        text = state.conditioned(text_name(expert, branch))
        modulation = self._of_step(state, "modulation", step)
        for block in self.models[expert].blocks.values():
            if isinstance(block.attn1.processor, ShardedAttention):
                block.attn1.processor.shards = state.shards
            hidden = block(hidden, text, modulation, state.rotary)
        return hidden

    def predict(self, state: WanState, step: int, hidden: Tensor) -> Tensor:
        """Output norm, projection and unpatchify, as the end of `WanTransformer3DModel.forward`: [1, C, F', H', W']."""
        model = self.models[state.steps[step].expert]
        time = self._of_step(state, "time", step)
        if self._spec.kind == "ti2v":
            shift, scale = (model.scale_shift_table.unsqueeze(0) + time.unsqueeze(2)).chunk(2, dim=2)
            shift, scale = shift.squeeze(2), scale.squeeze(2)
        else:
            shift, scale = (model.scale_shift_table + time.unsqueeze(1)).chunk(2, dim=1)
        hidden = (model.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        return self._unpatchify(state, state.shards.gather(model.proj_out(hidden)))

    def _unpatchify(self, state: WanState, patches: Tensor) -> Tensor:
        _, _, frames, height, width = state.latent_shape
        patch = self._spec.patch
        grid = (frames // patch[0], height // patch[1], width // patch[2])
        patches = patches.reshape(1, *grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return patches.flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _of_step(self, state: WanState, name: str, step: int) -> Tensor:
        """Time embedding or modulation of a step: [1, ...], or with `expand_timesteps` [1, s or 1, ...]."""
        expert, position = state.steps[step].expert, state.position_in_expert(step)
        rows = state.conditioned(f"{name}.{expert}")[position]
        if self._spec.kind != "ti2v":
            return rows
        row = state.conditioned(f"row.{expert}")
        if expert not in state.uniform:
            state.uniform[expert] = (row == 0).all(dim=1).tolist()
        if state.uniform[expert][position]:
            return rows[:1].unsqueeze(0)
        return rows[row[position, state.shards.own].long()].unsqueeze(0)
