"""Tensor parallelism of diffusers' Wan blocks: attention by heads, feed-forward by columns; Wan's RMS norm over all
heads needs the others' sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cineline.families.tensor_parallel import share_linears
from cineline.transport.axis import Axis
from cineline.weights.files import Shard

COLUMNS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v", "ffn.net.0.proj")
"""Linears whose outputs are shared out."""

ROWS = ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")
"""Linears whose inputs are shared out; their outputs are summed over the ranks."""

NORMS = ("attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k")
"""RMS norms over all heads."""

ADDED_COLUMNS, ADDED_NORMS = ("attn2.add_k_proj", "attn2.add_v_proj"), ("attn2.norm_added_k",)
"""The same for the keys and values of images, in the blocks that have some (Wan 2.1)."""


class SharedRMSNorm(nn.Module):
    """RMS norm over features that are shared out over the ranks of an axis (as `torch.nn.RMSNorm` over all)."""

    def __init__(self, features: int, eps: float, axis: Axis) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, device="meta"))
        self._eps = eps
        self._axis = axis

    def forward(self, own: Tensor) -> Tensor:
        """[..., features of this rank] to the same."""
        values = own.float()
        squares = self._axis.all_reduce(values.square().sum(-1, keepdim=True))
        features = self.weight.numel() * self._axis.size
        return (values * torch.rsqrt(squares / features + self._eps)).type_as(own) * self.weight


def shard_block(block: Any, axis: Axis) -> dict[str, Shard]:
    """Replace a block's layers by this rank's shares of them (on the meta device); what to read of each tensor."""
    added = block.attn2.add_k_proj is not None
    shards = share_linears(block, axis, COLUMNS + ADDED_COLUMNS * added, ROWS)
    for name in NORMS + ADDED_NORMS * added:
        whole = block.get_submodule(name)
        features = whole.weight.numel() // axis.size
        block.set_submodule(name, SharedRMSNorm(features, whole.eps, axis))
        shards[f"{name}.weight"] = Shard(0, axis.index, axis.size)
    for attention in (block.attn1, block.attn2):
        attention.heads //= axis.size
    return shards
