"""Writes a component's tensors into safetensors files of a bounded size, with their index, as diffusers does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cineline.errors import OutputError, reason, shown
from cineline.weights.layout import INDEX, SUFFIX


def write_sharded(folder: Path, stem: str, sizes: Mapping[str, int], make: Callable[[str], Tensor], limit: int) -> None:
    """Make tensors one after another; those of one file are in memory at once.

    Args:
        stem: of the files' names. sizes: bytes of each tensor, in the order in which they are written.
        limit: bytes of a file; a larger tensor has one of its own.

    Raises:
        OutputError: a file cannot be written.
    """
    groups: list[list[str]] = [[]]
    taken = 0
    for name, size in sizes.items():
        if groups[-1] and taken + size > limit:
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += size
    places: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        part = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        file = folder / f"{stem}{part}{SUFFIX}"
        try:
            save_file({name: make(name) for name in group}, file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{shown(file)} cannot be written ({reason(error)}): check the disk.") from None
        places |= dict.fromkeys(group, file.name)
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (folder / f"{stem}{INDEX}.json").write_text(json.dumps(index, indent=2) + "\n")
