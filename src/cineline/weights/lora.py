"""LoRA files: whose each tensor is and what is to be done with it, by names alone (no torch until one is read).

| written by | down, up | beside them |
|-|-|-|
| PEFT, DiffSynth, ai-toolkit, diffusion-pipe | `lora_A[.NAME].weight`, `lora_B[.NAME].weight` | `lora_B.bias` |
| kohya, musubi, LightX2V | `lora_down.weight`, `lora_up.weight` | `alpha` |
| ComfyUI's and LightX2V's extractions | the same | `diff` (of the weight), `diff_b` (of the bias), `diff_m` (of the \
modulation) |

The arithmetic is diffusers' and PEFT's, so that bits agree: `alpha / rank` is folded into the two factors
(diffusers, loaders/lora_conversion_utils.py), which are cast to the weight's dtype; what is added is their product in
float32, times the scale, cast (PEFT, tuners/lora/layer.py, `Linear.get_delta_weight`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cineline.errors import CheckpointError, shown
from cineline.weights.sources import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROLES: Mapping[str, str] = {
    "down": r"lora_A(?:\.\w+)?\.weight|lora_down(?:\.\w+)?\.weight|lora\.down\.weight",
    "up": r"lora_B(?:\.\w+)?\.weight|lora_up(?:\.\w+)?\.weight|lora\.up\.weight",
    "bias": r"lora_B(?:\.\w+)?\.bias|diff_b",
    "alpha": r"alpha",
    "diff": r"diff",
    "modulation": r"diff_m",
}
"""Endings of names."""

STRANGERS: Mapping[str, str] = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lokr_": "a LoKr",
    "hada_": "a LoHa",
    "lora_mid": "a LoCon with a middle factor",
    "oft_": "an OFT",
}
"""Words in names of other adapters."""

ENDING = re.compile("(?P<module>.+?)\\.(?:" + "|".join(f"(?P<{role}>{names})" for role, names in ROLES.items()) + ")")

METADATA, CONFIG = "lora_adapter_metadata", "adapter_config.json"
"""Where PEFT's config is: in the header, as diffusers writes it, or beside the file."""


@dataclass(frozen=True)
class Delta:
    """What a LoRA adds to one tensor: the stored names of its parts.

    Attributes:
        down, up: the factors. alpha: of them. diff: a tensor of the same shape.
        factor: of the product, which PEFT's config says.
    """

    down: str | None = None
    up: str | None = None
    alpha: str | None = None
    diff: str | None = None
    factor: float = 1.0

    @property
    def names(self) -> list[str]:
        """All that are there."""
        return [name for name in (self.down, self.up, self.alpha, self.diff) if name is not None]


def role_of(source: Source, name: str) -> tuple[str, str] | None:
    """The module that a stored tensor is for, as the file calls it, and its role there; None for what is neither.

    Raises:
        CheckpointError: it is another kind of adapter.
    """
    for word, what in STRANGERS.items():
        if any(part.startswith(word) for part in name.split(".")):
            raise CheckpointError(
                f"{shown(source.path)} is {what}, by its tensor {shown(name)}, which is not read: use a LoRA, or a "
                "model that it is merged into."
            )
    found = ENDING.fullmatch(name)
    return (found["module"], str(found.lastgroup)) if found else None


@dataclass(frozen=True)
class Multiplier:
    """PEFT's `alpha / rank`, where a config says it: 1 without one."""

    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> Multiplier:
        """What the file's header says, or the config beside it.

        Raises:
            CheckpointError: it is no JSON.
        """
        beside = source.path.parent / CONFIG
        try:
            if METADATA in source.metadata:
                told = json.loads(source.metadata[METADATA])
                return cls({name.removeprefix("transformer."): value for name, value in told.items()})
            return cls(dict(json.loads(beside.read_text(encoding="utf-8-sig"))) if beside.is_file() else {})
        except (OSError, ValueError, TypeError, AttributeError):
            where = METADATA if METADATA in source.metadata else beside
            raise CheckpointError(
                f"{shown(source.path)}: {shown(where)} is no JSON object: download it again."
            ) from None

    def __call__(self, module: str, rank: int) -> float:
        """Of a module by its name in the model that was trained."""
        alpha = self.config.get("lora_alpha")
        for pattern, own in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = own
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


class Adapter:
    """A LoRA for one component.

    Args:
        deltas: by the name of the tensor that they change, as the module calls it. scale: of all.

    Attributes:
        bytes_read: of its tensors so far.
    """

    def __init__(self, source: Source, deltas: Mapping[str, Delta], scale: float) -> None:
        self._source, self.deltas, self.scale = source, deltas, scale
        self.bytes_read = 0

    @property
    def numbers(self) -> dict[str, int]:
        """How many there are in the file for each tensor."""
        shapes = {name: stored.shape for name, stored in self._source.stored.items()}
        return {target: sum(math.prod(shapes[name]) for name in delta.names) for target, delta in self.deltas.items()}

    def added(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor with what is added to it, in its own dtype.

        Raises:
            CheckpointError: a part cannot be read.
        """
        delta = self.deltas.get(name)
        if delta is None:
            return tensor
        if delta.down is not None:
            down, up = (factor.float().flatten(1) for factor in self.factors(name, tensor.dtype))
            product = (up @ down) * (delta.factor * self.scale)
            tensor = tensor + product.reshape(tensor.shape).to(tensor.dtype)
        if delta.diff is not None:
            diff = self.difference(name, tensor.dtype).reshape(tensor.shape)
            tensor = tensor + diff * self.scale
        return tensor

    def factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Down [rank, in, ...] and up [out, rank, ...] for a tensor that has them, `alpha / rank` in both."""
        delta = self.deltas[name]
        assert delta.down is not None and delta.up is not None
        down, up = self._take(delta.down), self._take(delta.up)
        if delta.alpha is not None:
            share_down, share_up = alpha_shares(float(self._take(delta.alpha).item()), down.shape[0])
            down, up = down * share_down, up * share_up
        return down.to(dtype, copy=True), up.to(dtype, copy=True)

    def difference(self, name: str, dtype: torch.dtype) -> Tensor:
        """What is to be added to a tensor, before the scale."""
        diff = self.deltas[name].diff
        assert diff is not None
        return self._take(diff).to(dtype, copy=True)

    def _take(self, stored: str) -> Tensor:
        tensor, taken = self._source.read(stored)
        self.bytes_read += taken
        return tensor


def alpha_shares(alpha: float, rank: int) -> tuple[float, float]:
    """The parts of `alpha / rank` that the down and the up factor take, the latter a power of two (diffusers'
    `get_alpha_scales`)."""
    down, up = alpha / rank, 1.0
    while 0 < down * 2 < up:
        down, up = down * 2, up / 2
    return down, up
