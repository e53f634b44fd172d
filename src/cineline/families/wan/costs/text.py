"""Costs of the text encoder (transformers' `UMT5EncoderModel`): an embedding, layers, a last norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cineline.core.config import Dtype
from cineline.core.work import Parameters, Work
from cineline.families.wan.constants import TEXT_TOKENS


@dataclass(frozen=True)
class TextCosts:
    """The encoder.

    Attributes:
        layers: of it. width, inner, ffn, heads: of a layer's states, attention and feed-forward.
        vocabulary: rows of the embedding. buckets: of the relative positions' bias.
        gated: whether the feed-forward has a gate. wide: whether its outer weights stay float32.
    """

    layers: int
    width: int
    inner: int
    ffn: int
    heads: int
    vocabulary: int
    buckets: int
    gated: bool
    wide: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: Dtype = "float32") -> TextCosts:
        """From a `text_encoder/config.json`; what it leaves out is as in transformers, which keeps the outer weights of
        feed-forwards in float32 where the others are float16."""
        heads = int(config.get("num_heads", 6))
        return cls(
            layers=int(config.get("num_layers", 8)),
            width=int(config.get("d_model", 512)),
            inner=heads * int(config.get("d_kv", 64)),
            ffn=int(config.get("d_ff", 1024)),
            heads=heads,
            vocabulary=int(config.get("vocab_size", 250112)),
            buckets=int(config.get("relative_attention_num_buckets", 32)),
            gated=str(config.get("feed_forward_proj", "gated-gelu")).startswith("gated"),
            wide=dtype == "float16",
        )

    @property
    def embedding(self) -> Parameters:
        """First stage."""
        return Parameters(self.vocabulary * self.width)

    @property
    def layer(self) -> Parameters:
        """One layer: attention with a bias for relative positions, feed-forward, two norms."""
        attention = 4 * self.width * self.inner + self.buckets * self.heads
        outer = self.width * self.ffn
        inner = (2 if self.gated else 1) * outer
        cast = attention + inner + 2 * self.width
        return Parameters(cast, outer) if self.wide else Parameters(cast + outer)

    @property
    def last_norm(self) -> Parameters:
        """Last stage."""
        return Parameters(self.width)

    @property
    def whole(self) -> Parameters:
        return self.embedding + self.layer * self.layers + self.last_norm

    def layer_work(self, itemsize: int) -> Work:
        """One layer over the 512 tokens of a prompt, the scores of its attention written out."""
        linear = 2 * TEXT_TOKENS * (4 * self.width * self.inner + (3 if self.gated else 2) * self.width * self.ffn)
        attention = 4 * TEXT_TOKENS * TEXT_TOKENS * self.inner
        scores = 8 * self.heads * TEXT_TOKENS * TEXT_TOKENS * itemsize
        moved = scores + TEXT_TOKENS * itemsize * (12 * self.width + 6 * self.ffn)
        return Work(linear=linear, attention=attention, moved=moved, calls=1)

    def hidden_bytes(self, itemsize: int) -> int:
        """Hidden states [1, 512, d] and the mask [1, 512], int64: what travels."""
        return TEXT_TOKENS * (self.width * itemsize + 8)

    def layer_workspace(self, itemsize: int) -> int:
        """Most bytes that a layer's forward holds beside its weights: scores, their bias and softmax; or the gate."""
        scores = 4 * self.heads * TEXT_TOKENS * TEXT_TOKENS * itemsize
        gate = TEXT_TOKENS * itemsize * (2 * self.width + 4 * self.ffn)
        return max(scores, gate)
