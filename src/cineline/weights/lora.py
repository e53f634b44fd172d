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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cineline.errors import CheckpointError, shown
from cineline.weights.sources import Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROLES: Mapping[str, str] = {
    "down": r"lora_A(?:\.\w+)?\.weight|lora_down(?:\.\w+)?\.weight|lora\.down\.weight",
    "up": r"lora_B(?:\.\w+)?\.weight|lora_up(?:\.\w+)?\.weight|lora\.up\.weight",
    "up_bias": r"lora_B(?:\.\w+)?\.bias",
    "bias": r"diff_b",
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
"""Where PEFT's config is: in the header, as diffusers writes it, or beside PEFT's own file."""

PEFTS_NAME, PEFTS_PREFIX = "adapter_model", "base_model.model."
"""Of PEFT's own files and of the names in them. A config beside another file is not its own: diffusers ignores it."""


@dataclass(frozen=True)
class Delta:
    """What a LoRA adds to one tensor: the stored names of its parts.

    Attributes:
        down, up: the factors. alpha: of them. diff: a tensor of the same shape.
        factor: of the product, or of its bias, which PEFT's config says.
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
    """PEFT's `alpha / rank`, where a config says it: 1 without one.

    Attributes:
        path: of the file.
    """

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> Multiplier:
        """What the file's header says, or the config beside it.

        Raises:
            CheckpointError: it is no JSON.
        """
        path, beside = source.path, source.path.parent / CONFIG
        is_pefts = path.name.startswith(PEFTS_NAME) or any(name.startswith(PEFTS_PREFIX) for name in source.stored)
        try:
            if METADATA in source.metadata:
                told = json.loads(source.metadata[METADATA])
                return cls(path, {name.removeprefix("transformer."): value for name, value in told.items()})
            is_there = is_pefts and beside.is_file()
            return cls(path, dict(json.loads(beside.read_text(encoding="utf-8-sig"))) if is_there else {})
        except (OSError, ValueError, TypeError, AttributeError):
            where = METADATA if METADATA in source.metadata else beside
            raise CheckpointError(
                f"{shown(source.path)}: {shown(where)} is no JSON object: download it again."
            ) from None

    def __call__(self, module: str, rank: int) -> float:
        """Of a module by its name in the model that was trained; of patterns the first one that fits says it.

        Raises:
            CheckpointError: what the config says is no number.
        """
        try:
            patterns = dict(self.config.get("alpha_pattern") or {}).items()
            own = [alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", module)]
            alpha = own[0] if own else self.config.get("lora_alpha")
            factor = 1.0 if alpha is None else float(alpha) / (math.sqrt(rank) if self._is_rslora else rank)
        except (TypeError, ValueError, re.error):
            factor = math.nan
        if not math.isfinite(factor):
            said = {name: self.config[name] for name in ("lora_alpha", "alpha_pattern") if name in self.config}
            raise CheckpointError(
                f"{shown(self.path)}: its config says {shown(said)}, which is no alpha for {shown(module)}: download "
                "it again."
            )
        return factor

    @property
    def _is_rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))


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
            tensor = tensor + diff * (delta.factor * self.scale if delta.down is None else self.scale)
        return tensor

    def factors(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Down [rank, in, ...] and up [out, rank, ...] for a tensor that has them, `alpha / rank` in both."""
        delta = self.deltas[name]
        assert delta.down is not None and delta.up is not None
        down, up = self._take(delta.down), self._take(delta.up)
        if delta.alpha is not None:
            alpha = float(self._take(delta.alpha).item())
            if not math.isfinite(alpha):
                raise CheckpointError(
                    f"{shown(self._source.path)}: {shown(delta.alpha)} is {alpha}: download it again, or use another "
                    "LoRA."
                )
            share_down, share_up = alpha_shares(alpha, down.shape[0])
            if down.dtype.itemsize == 1:  # there is no arithmetic in 8 bits
                down, up = down.to(dtype), up.to(dtype)
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
