"""Reads a module's own tensors, and no others, from a component's files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from cineline.errors import CheckpointError, shown
from cineline.weights.lora import Adapter
from cineline.weights.scaled import product, scales_of
from cineline.weights.sources import Source, Stored, listed, without_leading_ones


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
    """The tensors of one component.

    Args:
        source: its files.
        names: by a tensor's name in the module the stored one; None where they are alike.
        loras: what is added to tensors as they are read, in this order.

    Attributes:
        bytes_read: of all tensors read so far, without what is added.

    Raises:
        CheckpointError: a scale that is nobody's, or weights in a layout that is not read.
    """

    def __init__(self, source: Source, names: Mapping[str, str] | None = None, loras: Sequence[Adapter] = ()) -> None:
        self._source, self._loras = source, loras
        self._scales = scales_of(source)
        own = {name: name for name in source.stored} if names is None else names
        self._names = {name: stored for name, stored in own.items() if stored not in self._scales.beside}
        self.bytes_read = 0

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def names(self) -> list[str]:
        """Of all tensors, as the module calls them."""
        return list(self._names)

    def stored(self, name: str) -> Stored:
        """What a tensor is in its file."""
        return self._source.stored[self._names[name]]

    def is_scaled(self, name: str) -> bool:
        """Whether it has a scale beside it."""
        return self._names[name] in self._scales.of

    def check_names(self, expected: Iterable[str], ignored: Iterable[str] = ()) -> None:
        """Compare the stored names with those of the whole component.

        Args:
            expected: names of all the component's tensors, on whichever stage.
            ignored: parts of names that may be stored without being used.

        Raises:
            CheckpointError: tensors are missing or extra; the first ones are named.
        """
        wanted = set(expected)
        missing = sorted(wanted - self._names.keys())
        if missing:
            raise CheckpointError(f"{shown(self._source.path)} lacks {listed(missing)}: download it again.")
        extra = sorted(
            stored
            for name, stored in self._names.items()
            if name not in wanted and not any(part in name.split(".") for part in ignored)
        )
        if extra:
            raise CheckpointError(
                f"{shown(self._source.path)} has {listed(extra)} that its config does not know: use the config.json "
                "that belongs to it, or another file."
            )

    def check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """Compare a tensor's shape with the one that it must have.

        Raises:
            CheckpointError: it is missing, or has another.
        """
        if name not in self._names:
            raise CheckpointError(f"{shown(self._source.path)} lacks tensor {shown(name)}: download it again.")
        place = self.stored(name)
        if without_leading_ones(place.shape) != without_leading_ones(expected):
            raise CheckpointError(
                f"{shown(place.file)}: tensor {shown(self._names[name])} has shape {shown(list(place.shape))}, but the "
                f"config says {shown(list(expected))}: use the config.json that belongs to it."
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

        A weight with a scale, or to which LoRAs add, is read whole and made in `dtype` before it is cut.

        Raises:
            CheckpointError: it is missing, has another shape, or cannot be read.
        """
        expected = shape if shard is None else shard.whole(shape)
        self.check_shape(name, expected)
        stored, place = self._names[name], self.stored(name)
        cut = None if shard is None else shard.cut(shape)
        scale = self._scales.of.get(stored)
        loras = [lora for lora in self._loras if name in lora.deltas]
        if scale is None:
            tensor = self._take(stored, cut if place.shape == expected and not loras else None)
        else:
            tensor = product(self._take(stored), self._take(scale), dtype)
        for lora in loras:
            tensor = lora.added(name, tensor.reshape(expected).to(dtype))
        if tensor.shape != shape:
            tensor = tensor.reshape(expected)
            tensor = tensor if cut is None else tensor[cut]
        target = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=device, dtype=target, copy=True)

    def pieces(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, limit: int) -> Iterator[torch.Tensor]:
        """The same numbers as `read` gives without LoRAs, on the CPU, some rows after others.

        Args:
            limit: bytes of a piece's numbers in float32, that of one row at least.

        Raises:
            CheckpointError: as `read`.
        """
        self.check_shape(name, shape)
        stored, place = self._names[name], self.stored(name)
        count = max(1, limit // max(1, 4 * math.prod(shape[1:])))
        if place.shape != shape or not shape or count >= shape[0]:
            yield self.read(name, shape, dtype, torch.device("cpu"))
            return
        scale = self._scales.of.get(stored)
        factor = None if scale is None else self._take(scale)
        for start in range(0, shape[0], count):
            rows = slice(start, start + count)
            tensor = self._take(stored, (rows,))
            if factor is not None:
                tensor = product(tensor, factor if factor.numel() == 1 else factor[rows], dtype)
            yield tensor.to(dtype)

    def _take(self, stored: str, cut: tuple[slice, ...] | None = None) -> torch.Tensor:
        tensor, taken = self._source.read(stored, cut)
        self.bytes_read += taken
        return tensor

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
