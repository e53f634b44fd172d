"""Costs of Qwen2.5-VL's language layers (transformers' `Qwen2_5_VLTextModel`; no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cineline.core.work import Parameters, Work
from cineline.families.stack import Stack

SEVEN_BILLION: Mapping[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
"""Of Qwen2.5-VL-7B-Instruct's config."""


@dataclass(frozen=True)
class QwenText:
    """The encoder.

    Attributes:
        layers: of it. width, ffn: of a layer. heads, pairs: of queries, and of keys and values. vocabulary: tokens.
    """

    layers: int
    width: int
    ffn: int
    heads: int
    pairs: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> QwenText:
        """From a `text_encoder/config.json`, with a half for pictures beside it or not."""
        own = {**config, **(config.get("text_config") or {})}
        heads = int(own["num_attention_heads"])
        return cls(
            layers=int(own["num_hidden_layers"]),
            width=int(own["hidden_size"]),
            ffn=int(own["intermediate_size"]),
            heads=heads,
            pairs=int(own.get("num_key_value_heads") or heads),
            vocabulary=int(own["vocab_size"]),
        )

    @property
    def _pair_width(self) -> int:
        return self.width // self.heads * self.pairs

    def stack(self, layers: int, last_norm: bool) -> Stack:
        """Its first layers, with the norm behind them or without."""
        d, kv = self.width, self._pair_width
        attention = 2 * d * d + d + 2 * (d * kv + kv)
        layer = Parameters(attention + 3 * d * self.ffn + 2 * d)
        return Stack(layers, layer, Parameters(self.vocabulary * d), Parameters(d * last_norm))

    def layer_work(self, tokens: int, itemsize: int) -> Work:
        """One layer over a prompt."""
        d, kv = self.width, self._pair_width
        linear = 2 * tokens * (2 * d * d + 2 * d * kv + 3 * d * self.ffn)
        moved = tokens * itemsize * (24 * d + 4 * self.ffn)
        return Work(linear=linear, attention=4 * tokens * tokens * d, moved=moved, calls=1)

    def workspace(self, tokens: int, itemsize: int) -> int:
        """Most bytes that a layer's forward holds beside its weights: the gated feed-forward's, or attention's."""
        return tokens * itemsize * max(2 * self.width + 3 * self.ffn, 6 * self.width)
