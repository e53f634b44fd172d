"""The files that tensors come in, each of them read tensor by tensor (torch is loaded with the first one, if at all).

safetensors: 8 bytes with the header's length, a JSON header with each tensor's dtype, shape and offsets, the data
(github.com/huggingface/safetensors, "Format"). GGUF: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import json
import math
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cineline.core.extras import need
from cineline.errors import CheckpointError, reason, shown
from cineline.weights.layout import files_of

if TYPE_CHECKING:
    from torch import Tensor

Slices = tuple[slice, ...]

SAFETENSORS, GGUF, PICKLES = (".safetensors", ".sft"), (".gguf",), (".pth", ".pt", ".bin", ".ckpt")

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Before the name of a tensor that ComfyUI's converter has reshaped to rows of 256."""


NAMED = 3
"""Tensors that a message names."""

LENGTH, HEADER_LIMIT = 8, 100_000_000
"""Bytes that say how long a safetensors file's header is, and how long it may be, as in that package."""

LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""What torch's files began with before they were zip archives (torch/serialization.py, `MAGIC_NUMBER`)."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is, from the file's header.

    Attributes:
        dtype: as safetensors calls it (F32, F8_E4M3), or GGUF (Q4_K).
        nbytes: in the file, from byte `start` on; a pickle's tensors say no place.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    start: int = 0


class Source(ABC):
    """The tensors of one component, by the names that they are stored by.

    Attributes:
        path: of the file, or of a folder of files.
        stored: what there is. metadata: texts beside them.
    """

    def __init__(self, path: Path, stored: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.stored = stored
        self.metadata = metadata or {}

    @abstractmethod
    def read(self, name: str, cut: Slices | None = None) -> tuple[Tensor, int]:
        """A tensor or a part of it, maybe still in the file's memory map, and the bytes of the file that it took.

        Raises:
            CheckpointError: it cannot be read.
        """


def open_source(path: Path, variant: str | None = None) -> Source:
    """The tensors of a file, by its suffix, or of a folder of safetensors.

    Raises:
        CheckpointError: there is no such file, or it is broken. MissingLibrary: GGUF without `gguf`.
    """
    if path.is_dir():
        return SafetensorsFiles(path, files_of(path, variant))
    if not path.exists():
        raise CheckpointError(f"{shown(path)} does not exist: check the path.")
    suffix = path.suffix.lower()
    if suffix in SAFETENSORS:
        return SafetensorsFiles(path, [path])
    if suffix in GGUF:
        return GgufFile(path)
    if suffix in PICKLES:
        return PickledFile(path)
    known = ", ".join((*SAFETENSORS, *GGUF, *PICKLES))
    raise CheckpointError(
        f"{shown(path)} ends in {shown(path.suffix)}, and weights in one of {known}: give such a file."
    )


class SafetensorsFiles(Source):
    """One file, or all of a sharded component's."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        stored: dict[str, Stored] = {}
        metadata: dict[str, str] = {}
        for file in files:
            header, texts = _read_header(file)
            stored |= header
            metadata |= texts
        super().__init__(path, stored, metadata)

    def read(self, name: str, cut: Slices | None = None) -> tuple[Tensor, int]:
        stored = self.stored[name]
        try:
            with safe_open(stored.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name) if cut is None else file.get_slice(name)[cut]
        except (OSError, SafetensorError) as error:
            raise unreadable(stored.file, name, error) from None
        return tensor, tensor.nbytes


class PickledFile(Source):
    """A `.pth` as torch writes it: tensors by name, loaded with `weights_only`, so that it can run no code."""

    def __init__(self, path: Path) -> None:
        import torch

        try:
            with path.open("rb") as stream:
                is_legacy = stream.read(len(LEGACY)) == LEGACY
            if is_legacy:
                raise CheckpointError(
                    f"{shown(path)} is in torch's old format, out of which no tensor can be read alone: use a "
                    "safetensors file, or save it anew: torch.save(torch.load(file, weights_only=True), other)."
                )
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{shown(path)} is no file of tensors that torch reads without running code ({reason(error)}): "
                "download it again, or use a safetensors file."
            ) from None
        if (
            not isinstance(found, Mapping)
            or not found
            or not all(isinstance(one, torch.Tensor) for one in found.values())
        ):
            kind = type(found).__name__
            raise CheckpointError(f"{shown(path)} holds {kind} and not tensors by name: use a file of weights alone.")
        self._tensors: Mapping[str, Tensor] = found
        super().__init__(
            path,
            {
                str(name): Stored(path, tuple(one.shape), str(one.dtype).removeprefix("torch."), one.nbytes)
                for name, one in found.items()
            },
        )

    def read(self, name: str, cut: Slices | None = None) -> tuple[Tensor, int]:
        tensor = self._tensors[name] if cut is None else self._tensors[name][cut]
        return tensor, tensor.nbytes


class GgufFile(Source):
    """A GGUF file, whose tensors are dequantised to float32 as the `gguf` package does it, one at a time."""

    def __init__(self, path: Path) -> None:
        need("gguf")

        from cineline.weights.gguf_reader import HeaderReader

        try:
            reader = HeaderReader(path)
            self._tensors = {one.name: one for one in reader.tensors}
            shapes = {name: _gguf_shape(reader, one) for name, one in self._tensors.items()}
        except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"{shown(path)} is no GGUF file, or it is truncated ({reason(error)}): download it again."
            ) from None
        super().__init__(
            path,
            {
                name: Stored(path, shapes[name], one.tensor_type.name, int(one.n_bytes), int(one.data_offset))
                for name, one in self._tensors.items()
            },
        )

    def read(self, name: str, cut: Slices | None = None) -> tuple[Tensor, int]:
        import torch
        from gguf import dequantize

        one, stored = self._tensors[name], self.stored[name]
        data, shape = one.data, stored.shape
        if cut and len(data) == shape[0]:  # its rows lie one behind the other
            data = data[cut[0]]
            shape, cut = (len(data), *shape[1:]), (slice(None), *cut[1:])
        try:
            values = dequantize(data, one.tensor_type)
        except NotImplementedError as error:
            raise unreadable(stored.file, name, error) from None
        owned = values if values.flags.writeable else values.copy()  # a memory map is read-only, and torch warns
        tensor = torch.from_numpy(owned).reshape(shape)
        return tensor if cut is None else tensor[cut], int(data.nbytes)


def unreadable(file: Path, name: str, error: Exception) -> CheckpointError:
    """What is said of a tensor that cannot be read."""
    return CheckpointError(f"{shown(file)}: tensor {shown(name)} cannot be read ({reason(error)}): download it again.")


def listed(names: Sequence[str]) -> str:
    """Tensors' names as a message repeats them: the first ones, and how many there are."""
    if len(names) == 1:
        return f"tensor {shown(names[0])}"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} tensors ({', '.join(map(shown, names[:NAMED]))}{more})"


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """GGUF's writers leave them out."""
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def _gguf_shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """GGUF has the dimension that changes fastest first."""
    field = reader.get_field(f"{ORIGINAL_SHAPE}{tensor.name}")
    stored = tuple(int(size) for size in reversed(tensor.shape))
    if field is None:
        return stored
    shape = tuple(int(size) for size in field.contents())
    if math.prod(shape) != math.prod(stored) or any(size < 0 for size in shape):
        raise ValueError(
            f"{shown(tensor.name)} has shape {shown(list(stored))}, and is said to be {shown(list(shape))}"
        )
    return shape


def header_bytes(file: Path) -> bytes:
    """A safetensors file's header.

    Raises:
        CheckpointError: there is no such file, it is truncated, or no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH), "little")
            header = stream.read(length) if length <= HEADER_LIMIT else b""
    except FileNotFoundError:
        raise CheckpointError(f"{shown(file)} does not exist, but the index names it: download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{shown(file)} cannot be read ({reason(error)}): download it again.") from None
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"{shown(file)} is no safetensors file: its header would have {length} bytes, and such files' have "
            f"{HEADER_LIMIT} at most: download it again."
        )
    if len(header) < length or not length:
        raise _no_safetensors(file)
    return header


def _no_safetensors(file: Path) -> CheckpointError:
    return CheckpointError(f"{shown(file)} is no safetensors file, or its header is truncated: download it again.")


def _read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    text = header_bytes(file)
    try:
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", None) or {})
    except (ValueError, TypeError, AttributeError):
        raise _no_safetensors(file) from None
    first, size = LENGTH + len(text), file.stat().st_size
    found = [_stored(file, name, entry, first) for name, entry in header.items()]
    places = sorted(zip(found, header, strict=True), key=lambda pair: (pair[0].start + pair[0].nbytes, pair[0].start))
    for one, name in places:
        end = one.start + one.nbytes
        if end > size:
            raise CheckpointError(
                f"{shown(file)}: tensor {shown(name)} is truncated (it ends at byte {end}, the file at {size}): "
                "download it again."
            )
    return {name: one for one, name in places}, metadata


def _stored(file: Path, name: str, entry: Any, first: int) -> Stored:
    """What a safetensors header says of a tensor; `first` is where the data begin."""
    try:
        start, stop = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
    except (LookupError, TypeError, ValueError):
        start, stop, shape, dtype = -1, -1, (), ""
    numbers = (start, stop, *shape)
    if not all(type(one) is int and one >= 0 for one in numbers) or stop < start or not isinstance(dtype, str):
        raise CheckpointError(
            f"{shown(file)} is no safetensors file: its header says {shown(entry)} of tensor {shown(name)}, which is "
            "no place in a file: download it again."
        )
    return Stored(file, shape, dtype, stop - start, first + start)
