"""Tensor parallelism inside a stage: linears shared out by columns, then by rows (Shoeybi et al. 2019, arXiv
1909.08053), applied to a library's blocks from outside, before their weights are read.

torch's `parallelize_module` does this with DTensors that are whole at first; here a rank never holds more than its
shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cineline.transport.axis import Axis
from cineline.weights.files import Shard


class RowLinear(nn.Linear):
    """A linear layer whose input is shared out over the ranks of an axis."""

    def __init__(self, inputs: int, outputs: int, axis: Axis) -> None:
        super().__init__(inputs, outputs, device="meta")
        self._axis = axis

    def forward(self, own: Tensor) -> Tensor:
        """[..., inputs of this rank] to [..., outputs]."""
        return self._axis.all_reduce(F.linear(own, self.weight)) + self.bias


def share_linears(block: Any, axis: Axis, columns: Sequence[str], rows: Sequence[str]) -> dict[str, Shard]:
    """Replace a block's linears by this rank's shares of them (on the meta device); what to read of each tensor.

    Args:
        columns: those whose outputs are shared out. rows: whose inputs are; their outputs are summed over the ranks.
    """
    shards: dict[str, Shard] = {}
    for name in columns:
        whole = block.get_submodule(name)
        block.set_submodule(name, nn.Linear(whole.in_features, whole.out_features // axis.size, device="meta"))
        shards |= {f"{name}.{tensor}": Shard(0, axis.index, axis.size) for tensor in ("weight", "bias")}
    for name in rows:
        whole = block.get_submodule(name)
        block.set_submodule(name, RowLinear(whole.in_features // axis.size, whole.out_features, axis))
        shards[f"{name}.weight"] = Shard(1, axis.index, axis.size)
    return shards
