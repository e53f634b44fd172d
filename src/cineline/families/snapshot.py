"""A request's exported state: as one tensor of known size, so that it can travel like any other value, and as the
content of a file, so that it can be kept."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch

from cineline.errors import shown
from cineline.transport.channel import TensorSpec

ROOM = 32_768
"""Bytes for all that is not tensors' values."""

STRUCTURE, TENSOR, TUPLE = "structure", "tensor", "tuple"
"""In a file's metadata: the state as JSON, with the names of its tensors for them."""

MARKS = ({TENSOR}, {TUPLE})
"""Keys of what stands for a tensor, or for a tuple."""

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
    """The state, whose tensors are on the host, as the content of a safetensors file.

    Raises:
        TypeError: something in it would not come back as it is.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_described(dict(exported), "state", tensors))
    return safetensors.torch.save(tensors, {STRUCTURE: structure})  # type: ignore[no-any-return]


def _described(value: Any, where: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON can hold it, its tensors put into `tensors`."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"The key {shown(key)} of {where} is of type {_kind(key)}: a snapshot's are texts.")
        if set(value) in MARKS:
            (only,) = value
            raise TypeError(
                f"The only key of {where} is {shown(only)}, by which a snapshot finds what JSON cannot hold."
            )
        return {key: _described(each, f"{where}[{key!r}]", tensors) for key, each in value.items()}
    if type(value) in (tuple, torch.Size):
        return {TUPLE: _described(list(value), where, tensors)}
    if isinstance(value, list):
        return [_described(each, f"{where}[{number}]", tensors) for number, each in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{where} is of type {_kind(value)}: a snapshot holds tensors, Python's numbers, texts and None, in lists, "
        "tuples and dicts."
    )


def _kind(value: Any) -> str:
    """A type's name with its library's: torch, numpy and Python have some alike."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def read(content: bytes) -> dict[str, Any]:
    """What was written."""
    tensors = safetensors.torch.load(content)
    header = json.loads(content[LENGTH : LENGTH + int.from_bytes(content[:LENGTH], "little")])
    structure = header["__metadata__"][STRUCTURE]

    def back(value: dict[str, Any]) -> Any:
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return tuple(value[TUPLE]) if set(value) == {TUPLE} else value

    state: dict[str, Any] = json.loads(structure, object_hook=back)
    return state
