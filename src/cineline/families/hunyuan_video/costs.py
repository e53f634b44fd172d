"""What HunyuanVideo 1.5's parts weigh and compute (no torch).

Legend: S tokens of the video, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cineline.core.config import Dtype
from cineline.core.request import Job
from cineline.core.work import Parameters, Work
from cineline.families.double_stream import double_block, double_work
from cineline.families.hunyuan_video.constants import CONTEXT, DROPPED, GLYPH_ROWS, SKIPPED, TEXT_ROWS
from cineline.families.hunyuan_video.vae import HunyuanVae
from cineline.families.qwen_vl_costs import QwenText
from cineline.families.stack import Stack, StackCosts, StackLine

FREQUENCIES, GLYPH_WIDTH = 256, 2048
"""Of a timestep's embedding, and of the glyph embedder's inner layers."""

USUAL = (1, 32, 31, 30, 52)
"""Latents of 480x832 with 121 frames, for which the decoder's units are compared."""


@dataclass(frozen=True, kw_only=True)
class HunyuanCosts(StackCosts):
    """The model's weights.

    Attributes:
        width: D. head: of one head of attention. wide: of the feed-forwards, times D. refiner: layers of the text's.
        encoder: the text encoder. vae: the VAE's decoder.
    """

    width: int
    head: int
    wide: int
    refiner: int
    encoder: QwenText
    vae: HunyuanVae

    @classmethod
    def of(cls, configs: Mapping[str, Mapping[str, Any]], dtype: Dtype, vae_dtype: Dtype) -> HunyuanCosts:
        """From the configs of a checkpoint's components; what they leave out is as in diffusers."""
        own, encoder = configs["transformer"], QwenText.of(configs["text_encoder"])
        head, wide = int(own.get("attention_head_dim", 128)), int(own.get("mlp_ratio", 4))
        d, vae = head * int(own.get("num_attention_heads", 16)), HunyuanVae.of(configs["vae"])
        layers, refiner = int(own.get("num_layers", 54)), int(own.get("num_refiner_layers", 2))
        patch = int(own.get("patch_size", 1)) ** 2 * int(own.get("patch_size_t", 1))
        outputs = patch * int(own.get("out_channels") or 32)
        last = Parameters(d * 2 * d + 2 * d + d * outputs + outputs)
        return cls(
            transformer=Stack(layers, double_block(d, head, 1, wide), _embedders(own, d, patch, refiner), last),
            text=encoder.stack(encoder.layers - SKIPPED, last_norm=False),
            decoder=tuple(unit.parameters for unit in vae.units),
            before_decoder=Parameters(),
            dtype=dtype,
            vae_dtype=vae_dtype,
            beside=_glyph_encoder(configs["text_encoder_2"], dtype),
            width=d,
            head=head,
            wide=wide,
            refiner=refiner,
            encoder=encoder,
            vae=vae,
        )

    def block_shard(self, tp: int) -> Parameters:
        """See `StackCosts`."""
        return double_block(self.width, self.head, tp, self.wide)

    @property
    def decoder_flop(self) -> Sequence[int]:
        return [unit.flop(USUAL) for unit in self.vae.units]


def _linear(taken: int, given: int) -> int:
    return taken * given + given


def _embedders(own: Mapping[str, Any], d: int, patch: int, refiner: int) -> Parameters:
    """Of latents, times, prompts (with layers that refine them), glyphs and images."""
    text, image = int(own.get("text_embed_dim", 3584)), int(own.get("image_embed_dim", 1152))
    glyphs = int(own.get("text_embed_2_dim", 1472))
    times = _linear(FREQUENCIES, d) + _linear(d, d)
    layer = 4 * _linear(d, d) + _linear(d, 4 * d) + _linear(4 * d, d) + _linear(d, 2 * d) + 4 * d
    context = times + _linear(text, d) + _linear(d, d) + _linear(text, d) + refiner * layer
    written = 2 * glyphs + _linear(glyphs, GLYPH_WIDTH) + _linear(GLYPH_WIDTH, GLYPH_WIDTH) + _linear(GLYPH_WIDTH, d)
    pictures = 2 * image + _linear(image, image) + _linear(image, d) + 2 * d
    latents = _linear(int(own.get("in_channels", 65)) * patch, d)
    return Parameters(latents + times + context + written + pictures + 3 * d)


def _glyph_encoder(config: Mapping[str, Any], dtype: Dtype) -> Parameters:
    """transformers' `T5EncoderModel`, whose feed-forwards are gated; their outer weights stay float32 in float16."""
    d, heads = int(config["d_model"]), int(config["num_heads"])
    layer = 4 * d * heads * int(config["d_kv"]) + 3 * d * int(config["d_ff"]) + 2 * d
    buckets = int(config.get("relative_attention_num_buckets", 32)) * heads
    outer = d * int(config["d_ff"]) * int(config["num_layers"]) * (dtype == "float16")
    whole = int(config["vocab_size"]) * d + int(config["num_layers"]) * layer + buckets + d
    return Parameters(whole - outer, outer)


@dataclass(frozen=True)
class HunyuanLine(StackLine):
    """One division of it on given devices."""

    def _rows(self, job: Job) -> int:
        return self.spec.tokens(job) + CONTEXT  # type: ignore[no-any-return]

    def block_work(self, job: Job) -> Work:
        """See `StackLine`; masks are made anew in each block."""
        rows, costs = self._rows(job), self.costs
        work = double_work(rows, costs.width, self.parallel.tp, self.itemsize, costs.wide)
        return work + Work(moved=5 * rows * rows)

    def block_workspace(self, job: Job) -> int:
        """See `StackLine`: queries, keys and values of both streams, joined; two masks of a byte an entry, and what
        attention makes of them in the dtype, once more where rows are no multiple of 8 (torch pads it then)."""
        rows, tp = self._rows(job), self.parallel.tp
        masks = 2 + self.itemsize * (1 if rows % 8 == 0 else 2)
        return int(rows * self.costs.width * self.itemsize * (4 + 8 / tp)) + masks * rows * rows

    def ends_work(self, job: Job) -> tuple[Work, Work]:
        """See `StackLine`: before the blocks the prompt is refined for the step."""
        costs, tokens = self.costs, self.spec.tokens(job)
        channels = self.spec.latent_shape(job)[1]
        refined = costs.refiner * 2 * TEXT_ROWS * 14 * costs.width**2
        refined += 2 * TEXT_ROWS * costs.encoder.width * costs.width
        before = Work(linear=refined + 2 * tokens * (2 * channels + 1) * costs.width, calls=costs.refiner + 1)
        return before, Work(linear=2 * tokens * costs.width * channels, calls=1)

    def condition_work(self, job: Job) -> Work:
        """See `StackLine`: times, and prompts' glyphs where they have some."""
        d, steps = self.costs.width, job.steps
        glyphs = 2 * GLYPH_ROWS * (2 * GLYPH_WIDTH**2 + GLYPH_WIDTH * d + self.costs.beside.count)
        return Work(linear=steps * 2 * (FREQUENCIES * d + d * d) + self.branches(job) * glyphs, calls=steps)

    def conditioning_bytes(self, job: Job) -> int:
        """See `StackLine`."""
        return job.steps * self.costs.width * self.itemsize + self.branches(job) * CONTEXT  # type: ignore[no-any-return]

    def admitted_bytes(self, place: Any, job: Job) -> int:
        """And on the head the prompts, which it refines at each step."""
        prompts = self.branches(job) * (TEXT_ROWS * self.costs.encoder.width + CONTEXT * self.costs.width)
        return super().admitted_bytes(place, job) + prompts * self.itemsize * (place.pp == 0)  # type: ignore[no-any-return]

    def hidden_bytes(self, job: Job) -> int:
        """See `StackLine`: both streams."""
        return self._rows(job) * self.costs.width * self.itemsize  # type: ignore[no-any-return]

    def latent_bytes(self, job: Job) -> int:
        """See `StackLine`."""
        _, channels, frames, rows, columns = self.spec.latent_shape(job)
        return channels * frames * rows * columns * self.itemsize  # type: ignore[no-any-return]

    def text_layer_work(self, job: Job) -> Work:
        """See `StackLine`."""
        return self.costs.encoder.layer_work(TEXT_ROWS + DROPPED, self.itemsize)  # type: ignore[no-any-return]

    def text_workspace(self, job: Job) -> int:
        """See `StackLine`."""
        return self.costs.encoder.workspace(TEXT_ROWS + DROPPED, self.itemsize)  # type: ignore[no-any-return]

    def text_bytes(self, job: Job) -> int:
        """See `StackLine`, with the mask."""
        rows = TEXT_ROWS + DROPPED
        return rows * (self.costs.encoder.width * self.itemsize + 8)  # type: ignore[no-any-return]

    def unit_work(self, unit: int, job: Job) -> Work:
        """See `StackLine`."""
        return self.costs.vae.units[unit].work(self.spec.latent_shape(job), self.vae_itemsize)  # type: ignore[no-any-return]

    def unit_workspace(self, unit: int, job: Job) -> int:
        """See `StackLine`."""
        own = self.costs.vae.units[unit]
        return own.workspace(self.spec.latent_shape(job), self.vae_itemsize)  # type: ignore[no-any-return]

    def unit_bytes(self, unit: int, job: Job) -> int:
        """See `StackLine`."""
        count = 1
        for size in self.costs.vae.boundary(unit, self.spec.latent_shape(job)):
            count *= size
        return count * self.vae_itemsize
