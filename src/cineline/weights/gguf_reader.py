"""The `gguf` package's reader, without what a tokenizer takes of it (imports `gguf`, which few have).

Of an array the package makes some objects an element, of a tokenizer's 256,000 texts half a minute's and a GB's worth;
nothing here needs them, so long arrays are stepped over.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

LONG = 64
"""Elements of an array that is not read. Tensors' shapes, which are, have fewer."""


class HeaderReader(GGUFReader):
    """A file's fields and tensors."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """The package's own, but that it has no elements of long arrays.

        Raises:
            ValueError: an array of arrays, one that ends behind the file, or bytes in the other order.
        """
        if self.byte_order == "S":
            raise ValueError("its bytes are in the order of other machines")
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        if count <= LONG:
            return super()._get_field_parts(orig_offs, raw_type)
        return self._end(orig_offs + 12, kind, count) - orig_offs, [], [], [GGUFValueType.ARRAY, kind]

    def _end(self, at: int, kind: GGUFValueType, count: int) -> int:
        """Where an array ends whose first element is here."""
        if kind in self.gguf_scalar_to_np:
            return at + count * np.dtype(self.gguf_scalar_to_np[kind]).itemsize
        if kind != GGUFValueType.STRING:
            raise ValueError(f"an array of {kind.name}")
        content: Any = memoryview(self.data)  # type: ignore[arg-type]  # numpy's stubs do not say that it has a buffer
        for _ in range(count):
            if at >= len(content):
                raise ValueError("an array ends behind the file")
            at += 8 + int.from_bytes(content[at : at + 8], "little")
        return at
