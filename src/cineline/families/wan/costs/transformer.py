"""Costs of Wan's transformer (diffusers' `WanTransformer3DModel`).

Legend: S tokens, D model width, F feed-forward width, T text tokens (512), I rows of images, e bytes of a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cineline.core.work import Parameters, Work
from cineline.families.wan.constants import TEXT_TOKENS

FLOAT = 4
"""Bytes of the numbers that norms, gates and rope are computed in."""

MOVED_BY_HEADS, MOVED, MOVED_BY_CASTS = (20, 14), (18, 22), 38
"""Times S D that a block's element-wise operations read or write in its own dtype and in float: on queries, keys and
values, on hidden states, and (in float, where the own dtype is another) by casts and what they make of RMS norms;
counted on diffusers' own block (`tests/test_costs.py`)."""


@dataclass(frozen=True)
class TransformerCosts:
    """One expert.

    Attributes:
        layers: blocks. width, ffn, heads: D, F, attention heads.
        patch: latent frames, rows and columns of a token, multiplied.
        channels_in, channels_out: of the latents.
        text_width, frequencies: of the text embedding and of the timestep's.
        norm_weights: whether the cross attention's norm has weights.
        image_width: of what an image encoder makes (Wan 2.1); 0 without one. added_width: of what keys and values of
            images are made of, 0 likewise. image_rows: I. positions: of the images' embedder.
    """

    layers: int
    width: int
    ffn: int
    heads: int
    patch: int
    channels_in: int
    channels_out: int
    text_width: int
    frequencies: int
    norm_weights: bool
    image_width: int = 0
    added_width: int = 0
    image_rows: int = 0
    positions: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], image_rows: int = 0) -> TransformerCosts:
        """From a `transformer/config.json`; what it leaves out is as in diffusers."""
        heads = int(config.get("num_attention_heads", 40))
        channels = int(config.get("in_channels", 16))
        return cls(
            layers=int(config["num_layers"]),
            width=heads * int(config.get("attention_head_dim", 128)),
            ffn=int(config.get("ffn_dim", 13824)),
            heads=heads,
            patch=math.prod(config.get("patch_size", (1, 2, 2))),
            channels_in=channels,
            channels_out=int(config.get("out_channels") or channels),
            text_width=int(config.get("text_dim", 4096)),
            frequencies=int(config.get("freq_dim", 256)),
            norm_weights=bool(config.get("cross_attn_norm", True)),
            image_width=int(config.get("image_dim") or 0),
            added_width=int(config.get("added_kv_proj_dim") or 0),
            image_rows=image_rows,
            positions=int(config.get("pos_embed_seq_len") or 0),
        )

    # Weights. Time embedder, scale and shift tables and the norms stay float32 (`_keep_in_fp32_modules`).

    @property
    def block(self) -> Parameters:
        """One block: two attentions with norms of queries and keys, a feed-forward, a table."""
        return self.block_shard(1)

    def block_shard(self, tp: int) -> Parameters:
        """What one of `tp` ranks holds of a block (`models.tensor_parallel`)."""
        d, f = self.width, self.ffn
        columns = (6 * (d * d + d) + d * f + f) // tp
        rows = 2 * (d * d // tp + d) + d * f // tp + d
        norms = 4 * d // tp
        if self.added_width:
            columns += 2 * (self.added_width * d + d) // tp
            norms += d // tp
        return Parameters(columns + rows + norms, 6 * d + (2 * d if self.norm_weights else 0))

    @property
    def patch_embedding(self) -> Parameters:
        """First and last stage of the expert's group."""
        return Parameters(self.channels_in * self.patch * self.width + self.width)

    @property
    def output_head(self) -> Parameters:
        """Last stage of the expert's group: projection and its table."""
        outputs = self.channels_out * self.patch
        return Parameters(self.width * outputs + outputs, 2 * self.width)

    @property
    def condition_embedder(self) -> Parameters:
        """Head of the line: timesteps and text to the model's width."""
        d = self.width
        time = self.frequencies * d + d + d * d + d
        text = self.text_width * d + d + d * d + d
        return Parameters(6 * (d * d + d) + text, time) + self._image_embedder

    @property
    def _image_embedder(self) -> Parameters:
        """Norm, feed-forward without another width inside, norm, and a table of positions."""
        i, d = self.image_width, self.width
        if not i:
            return Parameters()
        return Parameters(i * i + i + i * d + d + self.positions * i, 2 * i + 2 * d)

    @property
    def whole(self) -> Parameters:
        """All of the expert."""
        return self.block * self.layers + self.patch_embedding + self.output_head + self.condition_embedder

    # Work of one forward.

    def block_work(self, tokens: int, itemsize: int, per_token: bool = False, sequence: int = 1, tp: int = 1) -> Work:
        """One rank's part of one block over S tokens.

        Args:
            per_token: each token has a modulation of its own (TI2V with a first frame).
            sequence: ranks that share the tokens. tp: ranks that share the weights.
        """
        own, d = tokens / sequence, self.width
        linear = 12 * own * d * d + 4 * TEXT_TOKENS * d * d + 4 * own * d * self.ffn
        linear += 4 * self.image_rows * self.added_width * d
        attention = 4 * own * tokens * d + 4 * own * (TEXT_TOKENS + self.image_rows) * d
        shared = own * (d * (MOVED_BY_HEADS[0] * itemsize + MOVED_BY_HEADS[1] * FLOAT) + self.ffn * 2 * itemsize)
        whole = own * d * (MOVED[0] * itemsize + MOVED[1] * FLOAT)
        casts = itemsize != FLOAT
        whole += own * d * MOVED_BY_CASTS * FLOAT * casts
        if per_token:
            whole += own * 6 * d * (itemsize + 3 * FLOAT + 2 * FLOAT * casts)
        return Work(linear=linear / tp, attention=attention / tp, moved=shared / tp + whole, calls=1)

    def embed_work(self, tokens: int, itemsize: int) -> Work:
        """Patch embedding, and the tokens in a row."""
        flop = 2 * tokens * self.channels_in * self.patch * self.width
        return Work(convolution=flop, moved=2 * tokens * self.width * itemsize, calls=1)

    def predict_work(self, tokens: int, itemsize: int) -> Work:
        """Output norm, projection, and the way back to the latents' shape."""
        flop = 2 * tokens * self.width * self.channels_out * self.patch
        return Work(linear=flop, moved=tokens * self.width * (2 * itemsize + 7 * FLOAT), calls=1)

    def condition_work(self, steps: int, texts: int, rows: int) -> Work:
        """Time embeddings of all steps, `rows` each, and the projection of the texts."""
        d = self.width
        time = 2 * rows * (self.frequencies * d + d * d + 6 * d * d)
        text = 2 * TEXT_TOKENS * (self.text_width * d + d * d)
        image = 2 * self.image_rows * self.image_width * (self.image_width + d)
        return Work(linear=steps * time + texts * text + image, calls=steps + texts)

    # Bytes.

    def hidden_bytes(self, tokens: int, itemsize: int) -> int:
        """Hidden states of S tokens, what a forward edge carries."""
        return tokens * self.width * itemsize

    def block_workspace(self, tokens: int, itemsize: int, per_token: bool = False, tp: int = 1) -> int:
        """Most bytes that a block's forward holds beside its weights and its input.

        The largest of three moments: rotated queries and keys, the gated sum in float, the feed-forward's
        activation (`tests/test_costs.py` counts live tensors of diffusers' own block).
        """
        e, wide = itemsize, self.ffn / self.width
        cast = FLOAT if e != FLOAT else 0  # `.float()` makes no copy of what is float
        attention = e + (4 * e + 3 * FLOAT / 2) / tp
        gated = 4 * e + 2 * FLOAT + cast
        feed_forward = 3 * e + 2 * wide * e / tp
        own_rows = 6 * FLOAT if per_token else 0
        return int(tokens * self.width * (max(attention, gated, feed_forward) + own_rows))
