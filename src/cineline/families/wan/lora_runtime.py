"""LoRAs beside the weights: each request has those that it names, `W x + B (A x) s`, as in diffusers where a LoRA is
loaded and not fused (PEFT, tuners/lora/layer.py, `Linear.forward`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cineline.families.wan.job import WanJob
from cineline.transport.axis import Axis
from cineline.weights.files import Shard
from cineline.weights.lora import Adapter


@dataclass(frozen=True)
class Product:
    """What a LoRA adds to a linear layer's output.

    Attributes:
        down: A, [rank, in], or [out, in] where there is no B. up: B, [out, rank]. bias: of that, [out].
        scale: of the product.
    """

    down: Tensor
    up: Tensor | None
    bias: Tensor | None
    scale: float


class LorasBeside:
    """Adds to the outputs of linear layers, by hooks.

    Args:
        tp: the ranks that share each block's weights.
    """

    def __init__(self, tp: Axis) -> None:
        self._tp = tp
        self._scales: Mapping[str, float] = {}

    def use(self, job: WanJob) -> None:
        """From here on the modules have this request's LoRAs, in its order."""
        self._scales = dict(zip(job.loras or (), job.lora_scales or (), strict=True))

    def attach(self, model: nn.Module, loras: Mapping[str, Adapter], shards: Mapping[str, Shard]) -> None:
        """Read what is for this model's modules, and have them add it.

        Args:
            shards: the parts that this rank has of tensors.

        Raises:
            CheckpointError: a tensor cannot be read.
        """
        for name, module in model.named_modules():
            weight = f"{name}.weight"
            own = {called: lora for called, lora in loras.items() if weight in lora.deltas}
            if isinstance(module, nn.Linear) and own:
                products = {called: product(lora, name, module, shards.get(weight)) for called, lora in own.items()}
                shares_inputs = weight in shards and shards[weight].dim == 1
                module.register_forward_hook(self._adding(products, shares_inputs))

    def _adding(self, products: Mapping[str, Product], shares_inputs: bool) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            (hidden,) = inputs
            for name, scale in self._scales.items():
                own = products.get(name)
                if own is None:
                    continue
                found = F.linear(hidden, own.down)
                if shares_inputs:
                    found = self._tp.all_reduce(found)
                if own.up is not None:
                    found = F.linear(found, own.up, own.bias)
                elif own.bias is not None:
                    found = found + own.bias
                output = output + found * (own.scale * scale)
            return output

        return add


def product(lora: Adapter, name: str, module: nn.Linear, shard: Shard | None) -> Product:
    """What a LoRA adds to this module, or to this rank's share of it, in the dtype of its weight and where that is."""
    delta, dtype = lora.deltas[f"{name}.weight"], module.weight.dtype
    down, up, bias = None, None, None
    if delta.down is not None:
        down, up = lora.factors(f"{name}.weight", dtype)
    else:
        down = _share(lora.difference(f"{name}.weight", dtype), 0, shard)
    if f"{name}.bias" in lora.deltas:
        bias = _share(lora.difference(f"{name}.bias", dtype), 0, shard)
    device = module.weight.device
    return Product(
        _share(down, 1, shard).to(device),
        None if up is None else _share(up, 0, shard).to(device),
        None if bias is None else bias.to(device),
        delta.factor * lora.scale,
    )


def _share(tensor: Tensor, dim: int, shard: Shard | None) -> Tensor:
    """The part that a rank has of it, if it is shared out along this dimension."""
    if shard is None or shard.dim != dim:
        return tensor
    return tensor.chunk(shard.count, dim)[shard.index].contiguous()
