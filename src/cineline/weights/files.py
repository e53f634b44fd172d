"""Reads a module's own tensors, and no others, from a component's folder of safetensors files.

File format: 8 bytes with the header's length, a JSON header with each tensor's dtype, shape and
offsets, the data (github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cineline.errors import CheckpointError, reason, shown
from cineline.weights.layout import files_of


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is, from the file's header."""

    file: Path
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A part of a tensor: the `index`-th of `count` equal ones along a dimension."""

    dim: int
    index: int
    count: int

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole tensor's shape."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(shape))

    def cut(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where a part of this shape lies."""
        start = self.index * shape[self.dim]
        return tuple(slice(start, start + size) if dim == self.dim else slice(None) for dim, size in enumerate(shape))


class Weights:
    """The safetensors files of one component.

    Args:
        folder: holds one `*.safetensors` file, or several and an index.
        variant: of them, where the component has it.

    Attributes:
        bytes_read: of all tensors read so far.

    Raises:
        CheckpointError: no such file, or one that is truncated.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        self._folder = folder
        self._stored: dict[str, StoredTensor] = {}
        self.bytes_read = 0
        for file in files_of(folder, variant):
            for name, shape in _read_header(file).items():
                self._stored[name] = StoredTensor(file, shape)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def check_names(self, expected: Iterable[str], ignored: Iterable[str] = ()) -> None:
        """Compare the stored names with those of the whole component.

        Args:
            expected: names of all the component's tensors, on whichever stage.
            ignored: parts of names that may be stored without being used.

        Raises:
            CheckpointError: a tensor is missing or extra; the first one is named.
        """
        wanted = set(expected)
        missing = sorted(wanted - self._stored.keys())
        if missing:
            raise CheckpointError(
                f"{shown(self._folder)} lacks tensor {shown(missing[0])} ({len(missing)} missing): download it again."
            )
        extra = sorted(
            name for name in self._stored.keys() - wanted if not any(part in name.split(".") for part in ignored)
        )
        if extra:
            raise CheckpointError(
                f"{shown(self._folder)} has a tensor {shown(extra[0])} that its config does not know ({len(extra)} "
                "extra): use the config.json that belongs to it."
            )

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard | None = None,
    ) -> torch.Tensor:
        """One tensor of this shape, or the shard of one, converted and copied out of the file's memory map.

        Raises:
            CheckpointError: it is missing, has another shape, or cannot be read.
        """
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{shown(self._folder)} lacks tensor {shown(name)}: download it again.")
        expected = shape if shard is None else shard.whole(shape)
        if stored.shape != expected:
            raise CheckpointError(
                f"{shown(stored.file)}: tensor {shown(name)} has shape {shown(list(stored.shape))}, but the config "
                f"says {shown(list(expected))}: use the config.json that belongs to it."
            )
        try:
            with safe_open(stored.file, framework="pt") as file:
                tensor: torch.Tensor = (
                    file.get_tensor(name) if shard is None else file.get_slice(name)[shard.cut(shape)]
                )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{shown(stored.file)}: tensor {shown(name)} cannot be read ({reason(error)}): download it again."
            ) from None
        self.bytes_read += tensor.nbytes
        target = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=device, dtype=target, copy=True)

    def load(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        fp32: Iterable[str] = (),
        aliases: Mapping[str, str] | None = None,
        shards: Mapping[str, Shard] | None = None,
    ) -> None:
        """Fill a module that was built on the meta device.

        Args:
            module: its state-dict names are the stored names.
            dtype: of the floating-point tensors.
            fp32: parts of names that stay float32 (diffusers' `_keep_in_fp32_modules`).
            aliases: stored name to use instead, for tied tensors that are stored once.
            shards: the part to read, for tensors of which the module has a part.

        Raises:
            CheckpointError: see `read`.
        """
        keep = set(fp32)
        state = {}
        for name, tensor in module.state_dict().items():
            wanted = torch.float32 if keep.intersection(name.split(".")) else dtype
            stored = (aliases or {}).get(name, name)
            state[name] = self.read(stored, tuple(tensor.shape), wanted, device, (shards or {}).get(name))
        module.load_state_dict(state, strict=True, assign=True)
        module.requires_grad_(False).eval()


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, size)))
    except FileNotFoundError:
        raise CheckpointError(f"{shown(file)} does not exist, but the index names it: download it again.") from None
    except (OSError, ValueError):
        raise CheckpointError(
            f"{shown(file)} is no safetensors file, or its header is truncated: download it again."
        ) from None
    header.pop("__metadata__", None)
    eights = sorted(name for name, entry in header.items() if str(entry["dtype"]).startswith("F8"))
    if eights:
        raise CheckpointError(
            f"{shown(file)}: tensor {shown(eights[0])} is stored in 8 bits ({shown(header[eights[0]]['dtype'])}), "
            "whose scales Cineline does not apply: use a checkpoint in bfloat16, float16 or float32."
        )
    for name, entry in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"][1]):
        end = 8 + length + entry["data_offsets"][1]
        if end > size:
            raise CheckpointError(
                f"{shown(file)}: tensor {shown(name)} is truncated (it ends at byte {end}, the file at {size}): "
                "download it again."
            )
    return {name: tuple(entry["shape"]) for name, entry in header.items()}
