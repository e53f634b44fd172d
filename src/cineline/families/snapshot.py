"""A request's exported state: as one tensor of known size, so that it can travel like any other value, and as the
content of a file, so that it can be kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch

from cineline.transport.channel import TensorSpec

ROOM = 32_768
"""Bytes for all that is not tensors' values."""

STRUCTURE, TENSOR = "structure", "tensor"
"""In a file's metadata: the state as JSON, with the names of its tensors for them."""

LENGTH = 8
"""Bytes that say how long the rest is, or a safetensors file's header."""


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with its tensors changed, in lists, tuples and dicts too."""
    if isinstance(value, tuple):
        return tuple(mapped(each, change) for each in value)
    if isinstance(value, dict):
        return {name: mapped(each, change) for name, each in value.items()}
    if isinstance(value, list):
        return [mapped(each, change) for each in value]
    return change(value) if isinstance(value, torch.Tensor) else value


def copied(value: Any) -> Any:
    """The same with copies of its tensors."""
    return mapped(value, torch.Tensor.clone)


def spec_of(nbytes: int) -> TensorSpec:
    """Of a state with so many bytes of tensors at most."""
    return TensorSpec((LENGTH + nbytes + ROOM,), torch.uint8)


def pack(exported: Mapping[str, Any], spec: TensorSpec, device: torch.device) -> torch.Tensor:
    """The state in the tensor that `spec_of` has announced."""
    written = io.BytesIO()
    torch.save(dict(exported), written)
    content = written.getbuffer()
    assert LENGTH + len(content) <= spec.nbytes, f"a state of {len(content)} bytes was announced as {spec.nbytes}"
    packed = torch.zeros(spec.shape, dtype=torch.uint8)
    packed[:LENGTH] = torch.frombuffer(bytearray(len(content).to_bytes(LENGTH, "little")), dtype=torch.uint8)
    packed[LENGTH : LENGTH + len(content)] = torch.frombuffer(content, dtype=torch.uint8)
    return packed.to(device)


def unpack(packed: torch.Tensor) -> dict[str, Any]:
    """What was packed, its tensors on the device of `packed`."""
    raw = packed.cpu().numpy().tobytes()
    length = int.from_bytes(raw[:LENGTH], "little")
    content = io.BytesIO(raw[LENGTH : LENGTH + length])
    loaded: dict[str, Any] = torch.load(content, map_location=packed.device, weights_only=True)
    return loaded


def write(exported: Mapping[str, Any]) -> bytes:
    """The state, whose tensors are on the host, as the content of a safetensors file."""
    tensors: dict[str, torch.Tensor] = {}

    def named(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value.item()  # a number of numpy's
        name = str(len(tensors))
        tensors[name] = value.contiguous()
        return {TENSOR: name}

    structure = json.dumps(exported, default=named)
    return safetensors.torch.save(tensors, {STRUCTURE: structure})  # type: ignore[no-any-return]


def read(content: bytes) -> dict[str, Any]:
    """What was written; tuples are lists now."""
    tensors = safetensors.torch.load(content)
    header = json.loads(content[LENGTH : LENGTH + int.from_bytes(content[:LENGTH], "little")])
    structure = header["__metadata__"][STRUCTURE]
    state: dict[str, Any] = json.loads(
        structure, object_hook=lambda value: tensors[value[TENSOR]] if set(value) == {TENSOR} else value
    )
    return state
