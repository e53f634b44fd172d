"""LTX-Video, brought by docs/adding-a-family.md alone: one text encoder, one stack whose blocks see the text through a
mask, and guidance that diffusers runs as one batch. Legend: S tokens of the latents, L of a prompt, D model width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from cineline.core.config import Cut, DeviceConfig, ParallelConfig, stages_alone
from cineline.core.request import Branch, Job, Kind, Value, VideoRequest, WorkItem
from cineline.families.checkpoint import read_configs
from cineline.families.flow import FlowStages, FlowState, make_solver
from cineline.families.frames import quantise
from cineline.families.guidance import combine
from cineline.families.pipeline_parallel import StagePart
from cineline.transport.channel import TensorSpec
from cineline.weights.files import Weights
from cineline.weights.sources import open_source

LENGTH = 128
"""L, to which LTXPipeline pads."""

CLASSES = {"transformer": "LTXVideoTransformer3DModel", "vae": "AutoencoderKLLTXVideo"}
CLASSES |= {"text_encoder": "T5EncoderModel", "scheduler": "FlowMatchEulerDiscreteScheduler"}
GIVEN = {"prompt", "negative_prompt", "height", "width", "num_frames", "guidance_scale", "seed", "fps"}
TABLE, TIED = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class LtxSpec:
    folder: Path
    configs: Mapping[str, Mapping[str, Any]]
    stages_class: ClassVar[str] = "outsider_family:LtxStages"
    place = staticmethod(stages_alone)

    @classmethod
    def open(cls, folder: Path) -> LtxSpec:
        return cls(folder, read_configs(folder, CLASSES))

    def cut(self, parallel: ParallelConfig, config: DeviceConfig) -> tuple[Cut, ...]:
        return parallel.cut(self.configs["transformer"]["num_layers"], self.configs["text_encoder"]["num_layers"], 1)

    def resolve(self, request: VideoRequest, number: int) -> Job:
        """Of a request that leaves nothing out."""
        given = request.model_dump(include=GIVEN) | {"steps": request.num_inference_steps, "chunks": +request.decode}
        given |= dict.fromkeys(("branches", "texts"), 1 + (given["guidance_scale"] > 1))
        return Job(id=number, has_image=False, **given)

    def grid(self, job: Job) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        time, space = self.ratios
        return (job.num_frames - 1) // time + 1, job.height // space, job.width // space

    @property
    def ratios(self) -> tuple[int, int]:
        """Of the VAE, in time and space."""
        scale = 2 ** sum(self.configs["vae"]["spatio_temporal_scaling"])
        return scale * self.configs["vae"]["patch_size_t"], scale * self.configs["vae"]["patch_size"]


class LtxStages(FlowStages):
    spec: LtxSpec

    def load(self, part: StagePart) -> int:
        self._part, self._dtype = part, getattr(torch, part.config.dtype)
        self._vae_dtype, configs = getattr(torch, part.config.vae_dtype), self.spec.configs
        with torch.device("meta"):
            self._model = LTXVideoTransformer3DModel.from_config(configs["transformer"])
            text = T5EncoderModel(T5Config(**configs["text_encoder"]))
            self._vae = AutoencoderKLLTXVideo.from_config(configs["vae"])
        self._width, self._text = self._model.rope.dim, text.encoder
        self._tokenizer = ByT5Tokenizer.from_pretrained(self.spec.folder / "tokenizer")
        self._processor = VideoProcessor(vae_scale_factor=self.spec.ratios[1])
        components = {"transformer": self._model, "text_encoder": text, "vae": self._vae}
        read = {name: Weights(open_source(self.spec.folder / name)) for name in components}
        for name, weights in read.items():
            weights.check_names(components[name].state_dict().keys() - {TIED})
        self._drop(text)
        read["transformer"].load(self._model, self._dtype, part.device)
        read["text_encoder"].load(text, self._dtype, part.device, aliases={TIED: "shared.weight"})
        if part.decodes and part.cut.decoder:
            read["vae"].load(self._vae, self._vae_dtype, part.device)
        # The first layer's bias is that of all layers.
        table = self._positions.relative_attention_bias
        if table.weight.is_meta:
            values = read["text_encoder"].read(TABLE, tuple(table.weight.shape), self._dtype, part.device)
            table.weight = nn.Parameter(values, requires_grad=False)
        return sum(weights.bytes_read for weights in read.values())

    def _drop(self, text: Any) -> None:
        """What other stages have. Units are keyed by their numbers, so that names stay the stored ones."""
        model, encoder, part = self._model, self._text, self._part
        self._positions = encoder.block[0].layer[0].SelfAttention
        encoder.block = nn.ModuleDict({str(layer): encoder.block[layer] for layer in part.cut.text})
        blocks = model.transformer_blocks
        model.transformer_blocks = nn.ModuleDict({str(layer): blocks[layer] for layer in part.cut.blocks})
        del text.shared, self._vae.encoder
        if not part.is_head:
            del model.proj_in, model.time_embed, model.caption_projection, encoder.embed_tokens
        if not part.is_tail:
            del model.proj_out, model.scale_shift_table, encoder.final_layer_norm

    # What a request is like.

    def solver(self, job: Job) -> Any:
        config = self.spec.configs["scheduler"]
        shift = (config[name] for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"))
        mu = calculate_shift(math.prod(self.spec.grid(job)), *shift)
        return make_solver(config, np.linspace(1.0, 1 / job.steps, job.steps), self._part.device, mu=mu)

    def noise(self, job: Job) -> Tensor:
        shape = (1, self._model.config.in_channels, *self.spec.grid(job))
        packed: Tensor = LTXPipeline._pack_latents(randn_tensor(shape, torch.Generator().manual_seed(job.seed)))
        return packed

    def latent_spec(self, job: Job) -> TensorSpec:
        return TensorSpec((1, math.prod(self.spec.grid(job)), self._model.config.in_channels), torch.float32)

    def rotary(self, job: Job, branch: Branch) -> Any:
        time, space = self.spec.ratios
        anything = torch.empty(1, device=self._part.device)
        return self._model.rope(anything, *self.spec.grid(job), (time / job.fps, space, space))

    def conditioning(self, state: FlowState) -> dict[str, TensorSpec]:
        specs = {}
        for branch in self._part.branches(state.job):
            specs[f"text {branch}"] = TensorSpec((1, LENGTH, self._width), self._dtype)
            specs[f"mask {branch}"] = TensorSpec((1, 1, LENGTH), self._dtype)
        shapes = {"times": (6 * self._width,), "embedded": (1, self._width)}
        return specs | {name: TensorSpec((state.job.steps, 1, 1, *of), self._dtype) for name, of in shapes.items()}

    def handed_on(self, state: FlowState, value: Value, item: WorkItem) -> tuple[TensorSpec, ...]:
        hidden = (1, state.latent_spec.shape[1], self._width)
        text = (1, LENGTH, self.spec.configs["text_encoder"]["d_model"])
        return (TensorSpec(hidden if value is Value.HIDDEN else text, self._dtype),)

    def combined(self, state: FlowState) -> Tensor:
        return combine({branch: each.float() for branch, each in state.predictions.items()}, state.job.guidance_scale)

    def final(self, state: FlowState) -> Tensor:
        latents: Tensor = LTXPipeline._unpack_latents(state.latents, *self.spec.grid(state.job))[0]
        return latents

    # What a stage computes.

    def compute(self, state: FlowState, item: WorkItem, starts: bool, ends: bool) -> None:
        if item.kind is Kind.TEXT:
            state.hidden = (self._encoded(state, item.branch, ends),)
        elif item.kind is Kind.ENCODE and starts:
            state.conditioning = self._conditions(state)
        elif item.kind is Kind.DENOISE:
            hidden = self._blocks(state, item)
            if ends:
                state.predictions[item.branch] = self._prediction(hidden, state.conditioned("embedded")[item.number])
            else:
                state.hidden = (hidden,)
        elif item.kind is Kind.DECODE:
            mean, std = self._vae.latents_mean, self._vae.latents_std
            latents = LTXPipeline._denormalize_latents(self.final(state)[None], mean, std)
            pixels = self._vae.decoder(latents.to(self._dtype).to(self._vae_dtype))
            state.hidden = (quantise(self._processor, pixels),)

    def _encoded(self, state: FlowState, branch: Branch, ends: bool) -> Tensor:
        if came := state.take_hidden():
            (hidden,) = came
        else:
            hidden = self._text.embed_tokens(self._tokens(state, branch).input_ids)
        bias = self._positions.compute_bias(LENGTH, LENGTH)
        for layer in self._text.block.values():
            hidden = layer(hidden, None, bias)[0]
        return self._text.final_layer_norm(hidden) if ends else hidden

    def _tokens(self, state: FlowState, branch: Branch) -> Any:
        padded = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
        return self._tokenizer(state.prompt(branch), **padded).to(self._part.device)

    def _conditions(self, state: FlowState) -> tuple[Tensor, ...]:
        made = []
        for branch in self._part.branches(state.job):
            made.append(self._model.caption_projection(state.texts.pop(branch)))
            made.append(((1 - self._tokens(state, branch).attention_mask.to(self._dtype)) * -10000.0).unsqueeze(1))
        rows = state.job.branches  # as in diffusers' batch: a product of one row has other bits
        times = [self._model.time_embed(time.expand(rows), None, rows, self._dtype) for time in state.solver.timesteps]
        for spec, each in zip(list(self.conditioning(state).values())[-2:], zip(*times, strict=True), strict=True):
            made.append(torch.stack([time[:1] for time in each]).view(spec.shape))
        return tuple(made)

    def _blocks(self, state: FlowState, item: WorkItem) -> Tensor:
        if came := state.take_hidden():
            (hidden,) = came
        else:
            assert state.latents is not None
            latents = state.latents.to(self._dtype)
            # As diffusers has them in memory, on which bits depend: a batch is new, one alone lies as it was drawn.
            alone = state.job.branches == 1
            hidden = self._model.proj_in(latents.mT.contiguous().mT if alone else latents.contiguous())
        text, mask = (state.conditioned(f"{name} {item.branch}") for name in ("text", "mask"))
        for block in self._model.transformer_blocks.values():
            hidden = block(hidden, text, state.conditioned("times")[item.number], state.rotary[item.branch], mask)
        return hidden

    def _prediction(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        shift, scale = (self._model.scale_shift_table[None, None] + embedded).unbind(2)
        prediction: Tensor = self._model.proj_out(self._model.norm_out(hidden) * (1 + scale) + shift)
        return prediction
