"""Writes a component's tensors into safetensors files of a bounded size, with their index, as diffusers does.

The files are written here, since the safetensors package wants all of a file's tensors in memory. Format: 8 bytes with
the header's length, a JSON header, the data (github.com/huggingface/safetensors, "Format"); as there, tensors of
wider numbers come first, so that each begins at a multiple of its number's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cineline.errors import OutputError, reason, shown
from cineline.weights.layout import INDEX, SUFFIX

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Those that are written, by the format's names."""


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Pieces = Callable[[str], Iterable[Tensor]]
"""By a tensor's name its numbers in order, each piece as large as the caller likes."""


def write_sharded(folder: Path, stem: str, planned: Mapping[str, Planned], pieces: Pieces, limit: int) -> None:
    """Write tensors one after another; one piece of one of them is in memory at once.

    Args:
        stem: of the files' names. planned: what there will be, in the order in which it is divided into files.
        limit: bytes of a file; a larger tensor has one of its own.

    Raises:
        OutputError: a file cannot be written.
    """
    groups: list[dict[str, Planned]] = [{}]
    taken = 0
    for name, one in planned.items():
        if groups[-1] and taken + one.nbytes > limit:
            groups.append({})
            taken = 0
        groups[-1][name] = one
        taken += one.nbytes
    places: dict[str, str] = {}
    folder.mkdir(exist_ok=True)
    for number, group in enumerate(groups, 1):
        part = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        file = folder / f"{stem}{part}{SUFFIX}"
        try:
            _write(file, group, pieces)
        except OSError as error:
            raise OutputError(f"{shown(file)} cannot be written ({reason(error)}): check the disk.") from None
        places |= dict.fromkeys(group, file.name)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(one.nbytes for one in planned.values())}, "weight_map": places}
        (folder / f"{stem}{INDEX}.json").write_text(json.dumps(index, indent=2) + "\n")


def _write(file: Path, group: Mapping[str, Planned], pieces: Pieces) -> None:
    names = sorted(group, key=lambda name: -group[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + group[name].nbytes
        header[name] = {
            "dtype": DTYPES[group[name].dtype],
            "shape": group[name].shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            written = sum(stream.write(_bytes(piece)) for piece in pieces(name))
            assert written == group[name].nbytes


def _bytes(tensor: Tensor) -> Any:
    """Them, as something that a stream writes without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
