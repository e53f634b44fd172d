"""A request's exported state as one tensor of known size, so that it can travel like any other value."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from cineline.transport.channel import TensorSpec

ROOM = 32_768
"""Bytes for all that is not tensors' values."""

LENGTH = 8
"""Bytes that say how long the rest is."""


def copied(value: Any) -> Any:
    """The same with copies of its tensors, in lists, tuples and dicts too."""
    if isinstance(value, tuple):
        return tuple(copied(each) for each in value)
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    if isinstance(value, list):
        return [copied(each) for each in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


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
