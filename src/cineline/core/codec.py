"""Plain values as bytes and back: JSON, with arrays, images and bytes behind it as they are.

Each value that JSON has not is an object with one name, which says what it is. What is read runs no code but the
constructors of classes that the reader has named, and of arrays and images.

    header's length (4 bytes, little-endian) | header (JSON) | the bytes that it speaks of, in its order
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel

from cineline import errors
from cineline.errors import CinelineError

LENGTH = struct.Struct("<I")

AS_IT_IS = frozenset((type(None), bool, int, float, str))
"""Classes that JSON has; not those that are derived from them."""

PIXELS = "RGB"
"""The mode of images that travel."""


class Codec:
    """Writes and reads values of some classes.

    Args:
        classes: dataclasses, named tuples, enums and pydantic's models that are read, by their names.
        imports: whether others are too, which the header names with their modules: for what comes from whoever may
            tell this process what to load.
    """

    def __init__(self, classes: Iterable[type], imports: bool = False) -> None:
        self._classes = {kind.__name__: kind for kind in classes}
        self._imports = imports

    def encode(self, value: Any) -> bytes:
        """The value as it travels.

        Raises:
            TypeError: something in it is of a class that cannot.
        """
        blobs: list[bytes | memoryview] = []
        header = json.dumps(self._plain(value, blobs), separators=(",", ":")).encode()
        return b"".join([LENGTH.pack(len(header)), header, *blobs])

    def decode(self, body: bytes | memoryview) -> Any:
        """What `encode` was given: mappings as dicts.

        Raises:
            Exception: of any kind, where the bytes are nothing that this reads.
        """
        view = memoryview(body)
        (length,) = LENGTH.unpack(view[: LENGTH.size])
        header = bytes(view[LENGTH.size : LENGTH.size + length])
        reader = _Reader(view[LENGTH.size + length :])
        value = json.loads(header.decode(), object_hook=partial(self._value, reader))
        reader.check_end()
        return value

    def _plain(self, value: Any, blobs: list[bytes | memoryview]) -> Any:
        """As JSON has it; what it has not goes to the blobs."""
        kind = type(value)
        if kind in AS_IT_IS:  # most of them
            return value

        def many(values: Iterable[Any]) -> list[Any]:
            return [self._plain(one, blobs) for one in values]

        if (names := _fields_of(kind)) is not None:
            return {"of": [self._name(kind), names, many(getattr(value, name) for name in names)]}
        match value:
            case Enum():
                return {"enum": [self._name(kind), value.value]}
            case str():
                return str(value)
            case int():
                return int(value)
            case float():  # numpy's float64 is one, too
                return float(value)
            case bytes() | bytearray():
                blobs.append(bytes(value))
                return {"bytes": len(value)}
            case np.ndarray() if not value.dtype.hasobject:
                blobs.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
                return {"array": [value.dtype.str, list(value.shape)]}
            case Image.Image() if value.mode == PIXELS:
                blobs.append(value.tobytes())
                return {"image": list(value.size)}
            case Path():
                return {"path": str(value)}
            case range():
                return {"range": [value.start, value.stop, value.step]}
            case CinelineError():
                return {"error": self._plain(_parts_of(value), blobs)}
            case list():
                return many(value)
            case Mapping():
                return {"map": [many(pair) for pair in value.items()]}
            case tuple():
                return {"tuple": many(value)}
        raise TypeError(f"{kind.__qualname__} cannot travel: use dataclasses, and numbers, texts and the like")

    def _value(self, reader: _Reader, tagged: dict[str, Any]) -> Any:
        """What an object of the header is; whatever it holds has been read."""
        ((tag, held),) = tagged.items()
        match tag:
            case "enum":
                return self._class(held[0], Enum)(held[1])
            case "bytes":
                return bytes(reader.take(held))
            case "array":
                return reader.array(*held)
            case "image":
                width, height = held
                return Image.frombytes(PIXELS, (width, height), bytes(reader.take(len(PIXELS) * width * height)))
            case "path":
                return Path(held)
            case "range":
                return range(*held)
            case "error":
                return _error(*held)
            case "map":
                return dict(held)
            case "tuple":
                return tuple(held)
            case "of":
                name, names, values = held
                return self._class(name, object)(**dict(zip(names, values, strict=True)))
        raise ValueError(f"nothing is called {tag[:20]!r}")

    def _name(self, kind: type) -> str:
        own = self._classes.get(kind.__name__)
        return kind.__name__ if own is kind else f"{kind.__module__}:{kind.__qualname__}"

    def _class(self, name: str, base: type) -> Any:
        found: Any = self._classes.get(name)
        if found is None and self._imports:
            module, _, path = name.partition(":")
            found = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        if not isinstance(found, type) or not issubclass(found, base) or (base is object and _fields_of(found) is None):
            raise ValueError(f"{name[:80]!r} is no class that is read here")
        return found


class _Reader:
    """The bytes behind a header, taken one after the other."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def take(self, nbytes: int) -> memoryview:
        taken = self._view[self._at : self._at + nbytes]
        if nbytes < 0 or len(taken) < nbytes:
            raise ValueError(f"{nbytes} bytes are not there")
        self._at += nbytes
        return taken

    def array(self, dtype: str, shape: list[int]) -> np.ndarray:
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(math.prod(shape) * kind.itemsize), kind).reshape(shape).copy()

    def check_end(self) -> None:
        if self._at != len(self._view):
            raise ValueError(f"{len(self._view) - self._at} bytes are left over")


def _named(kind: Any) -> list[str] | None:
    """What a class's constructor takes, by name; None where it is none of fields."""
    if issubclass(kind, BaseModel):
        return list(kind.model_fields)
    if issubclass(kind, tuple):
        return list(kind._fields) if hasattr(kind, "_fields") else None
    return [each.name for each in dataclasses.fields(kind) if each.init] if dataclasses.is_dataclass(kind) else None


_fields_of: Callable[[type], list[str] | None] = cache(_named)


def _parts_of(error: CinelineError) -> list[Any]:
    """The name of its class, and what that takes; of one that is not `errors`' own the words."""
    kind = type(error)
    if getattr(errors, kind.__name__, None) is not kind:
        return [CinelineError.__name__, [str(error)]]
    return [kind.__name__, list(error.__reduce__()[1])]


def _error(name: str, arguments: list[Any]) -> CinelineError:
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, CinelineError)):
        raise ValueError(f"{name[:80]!r} is no error of Cineline's")
    return kind(*arguments)
