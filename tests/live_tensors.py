"""Counts the bytes of live tensors, and of what element-wise operations touch: the oracle of predicted activations."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "convolution", "attention")
VIEWS = ("view", "transpose", "permute", "slice", "select", "split", "squeeze", "expand", "detach", "alias", "aten.t.")
"""Parts of operators' names: what is counted as FLOP, and what touches no memory."""


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Of what is made inside it.

    Args:
        held: tensors that were there before, whose views are not to be counted.

    Attributes:
        peak: most bytes that were alive at once.
        moved: bytes that element-wise operations read and wrote.
    """

    def __init__(self, held: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._old = {tensor.untyped_storage()._cdata for tensor in held}
        self._alive: dict[int, int] = {}
        self.peak = 0
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in results:
            self._count(tensor.untyped_storage())
        if not any(part in str(func) for part in (*PRODUCTS, *VIEWS, "empty", "new_")):
            taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*taken, *results))
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive or key in self._old:
            return
        self._alive[key] = storage.nbytes()
        self.peak = max(self.peak, sum(self._alive.values()))
        weakref.finalize(storage, self._alive.pop, key, 0)
