"""Weights in 8 bits with a scale beside them: which scale is whose, and their product (no torch until then).

| layout | scale | beside it |
|-|-|-|
| plain cast | none | |
| ComfyUI, first | `<layer>.scale_weight`, float32 scalar | `scaled_fp8`, `<layer>.scale_input` |
| ComfyUI, now | `<layer>.weight_scale` | `<layer>.comfy_quant` (JSON as uint8), `<layer>.input_scale`, or \
`_quantization_metadata` in the header |
| musubi, Kijai | `<layer>.scale_weight` of [1], [out, 1] or [out, blocks, 1] | `scaled_fp8` |
| LightX2V | `<layer>.weight_scale` of [out, 1] | |

The product is comfy-kitchen's `dequantize_per_tensor_fp8` (backends/eager/quantization.py): weight and scale in the
dtype that is computed in, multiplied there; musubi's `fp8_linear_forward_patch` is alike. Scales of inputs are for
products in 8 bits, which nobody makes here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cineline.errors import CheckpointError, shown
from cineline.weights.sources import Source, Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHT = ".weight"
SCALES = (".scale_weight", ".weight_scale")
BESIDE = (".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"

FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""Of ComfyUI's names for how a layer is stored, those that are read."""

INTEGERS = ("I8", "U8", "int8", "uint8", "F4", "F8_E8M0")
"""Dtypes of weights that need more than a product: int8 with rotations, nvfp4, mxfp8."""


@dataclass(frozen=True)
class Scales:
    """What is beside a component's weights.

    Attributes:
        of: the scale's name by the weight's.
        beside: names of all that is no tensor of the model, those scales included.
    """

    of: Mapping[str, str] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()


def scales_of(source: Source) -> Scales:
    """The scales in a source, each with its weight.

    Raises:
        CheckpointError: a scale without a weight, one of an unknown shape, or a layout that is not read, by its name.
    """
    layers = _check_formats(source)
    found: dict[str, str] = {}
    beside = set()
    for name, stored in source.stored.items():
        suffix = next((suffix for suffix in (*SCALES, *BESIDE) if name.endswith(suffix)), None)
        if suffix is None:
            if name.rpartition(".")[2] == MARKER:
                beside.add(name)
            continue
        weight = name.removesuffix(suffix) + WEIGHT
        if weight not in source.stored:
            raise CheckpointError(
                f"{shown(source.path)} has {shown(name)} and no {shown(weight)} that it is for: download it again."
            )
        beside.add(name)
        if suffix in SCALES:
            if weight in found:
                raise CheckpointError(
                    f"{shown(source.path)} has {shown(found[weight])} and {shown(name)} for one weight: use a file "
                    "that has one scale for each."
                )
            if stored.dtype in INTEGERS:
                raise _refused(source, name, stored.dtype)
            _check_shape(source, name, stored, source.stored[weight])
            found[weight] = name
    for layer in layers:
        if not any(weight == layer + WEIGHT or weight.endswith(f".{layer}{WEIGHT}") for weight in found):
            raise CheckpointError(
                f"{shown(source.path)} says that {shown(layer)} is scaled, and has no scale of its weight: download it "
                "again."
            )
    for name in source.stored.keys() - beside:
        if source.stored[name].dtype in INTEGERS and len(source.stored[name].shape) > 1:
            raise _refused(source, name, source.stored[name].dtype)
    return Scales(found, frozenset(beside))


def product(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight, times its scale, both in this dtype; a scale is one number, one a row, or one a block of a row."""
    weight, scale = weight.to(dtype), scale.to(dtype)
    if scale.numel() == 1:
        return weight * scale.reshape(())
    if scale.ndim == 3:
        return (weight.reshape(*scale.shape[:2], -1) * scale).reshape(weight.shape)
    return weight * scale.reshape(-1, 1)


def _check_formats(source: Source) -> list[str]:
    """The layers that are said to be scaled, all in a format that is read."""
    formats: dict[str, Any] = {}
    if METADATA in source.metadata:
        formats = _layers(source)
    for name in source.stored:
        if name.endswith(".comfy_quant") and name.removesuffix(".comfy_quant") + WEIGHT in source.stored:
            try:
                formats[name.removesuffix(".comfy_quant")] = json.loads(bytes(source.read(name)[0].tolist()))
            except (ValueError, TypeError):
                raise CheckpointError(f"{shown(source.path)}: {shown(name)} is no JSON: download it again.") from None
    for layer, told in formats.items():
        how = told if isinstance(told, dict) else {"format": told}
        if how.get("format") not in FORMATS:
            raise _refused(source, layer, str(how.get("format")))
        if how.get("convrot"):
            raise _refused(source, layer, "convrot")
    return list(formats)


def _layers(source: Source) -> dict[str, Any]:
    try:
        return dict(json.loads(source.metadata[METADATA])["layers"])
    except (ValueError, LookupError, TypeError):
        raise CheckpointError(f"{shown(source.path)}: its {METADATA} is no JSON: download it again.") from None


def _refused(source: Source, name: str, layout: str) -> CheckpointError:
    return CheckpointError(
        f"{shown(source.path)}: {shown(name)} is stored as {shown(layout)}, and of scaled weights "
        f"{' and '.join(FORMATS)} are read: use a file in one of them, in bfloat16 or float16, or GGUF."
    )


def _check_shape(source: Source, name: str, scale: Stored, weight: Stored) -> None:
    rows, columns = (*weight.shape, 0, 0)[:2]
    by_blocks = (
        len(scale.shape) == 3
        and scale.shape[0] == rows
        and scale.shape[2] == 1
        and scale.shape[1]
        and columns % scale.shape[1] == 0
    )
    if math.prod(scale.shape) != 1 and not (
        len(weight.shape) == 2 and (scale.shape in ((rows,), (rows, 1)) or by_blocks)
    ):
        raise CheckpointError(
            f"{shown(source.path)}: {shown(name)} has shape {shown(list(scale.shape))} for a weight of "
            f"{shown(list(weight.shape))}, and a scale is one number, one a row or one a block of a row: use "
            "another file."
        )
