"""Finds NaN and infinity in what a request's items make, and which rank made the first of them.

Nothing waits for it: two numbers of each tensor go to the host with the next report. They are the least and the
greatest value, which are not finite where any value is not; one kernel reads the tensor once and writes nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cineline.core.request import WorkItem
from cineline.rank.pace import Pace
from cineline.transport.queue import DeviceQueue


def extremes(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Least and greatest value of each tensor that can hold a NaN, float32 scalars."""
    held = (tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel())
    return [bound.float() for tensor in held for bound in torch.aminmax(tensor)]


class Guard:
    """One request's on one rank. What comes from others is looked at too, so that nobody is blamed for it.

    Args:
        say: called, once at most, with the item in which this rank made what is not finite of what is.

    Attributes:
        spoiled: whether something is not finite here, whoever made it; known when the device has got there.
    """

    def __init__(self, device: DeviceQueue, pace: Pace, say: Callable[[WorkItem], None]) -> None:
        self._device = device
        self._pace = pace
        self._say = say
        self._seen: list[Tensor] = []
        self._own: list[bool] = []
        self.spoiled = False

    def came(self, tensors: Iterable[Tensor]) -> None:
        """Look at what others have made."""
        self._look(tensors, own=False)

    def made(self, tensors: Iterable[Tensor]) -> None:
        """Look at what this rank has made."""
        self._look(tensors, own=True)

    def _look(self, tensors: Iterable[Tensor], own: bool) -> None:
        seen = extremes(tensors)
        self._seen += seen
        self._own += [own] * len(seen)

    def settle(self, item: WorkItem) -> None:
        """Have what was seen in the item read, before whatever is reported from now on."""
        if self._seen:
            numbers = self._device.to_host(torch.stack(self._seen))
            self._pace.after(partial(self._read, item, numbers, self._own))
            self._seen, self._own = [], []

    def _read(self, item: WorkItem, numbers: Tensor, own: list[bool]) -> None:
        if self.spoiled:
            return
        for finite, made_here in zip(np.isfinite(numbers.numpy()), own, strict=True):
            if not finite:  # the first one, in the order of things, tells whose it is
                self.spoiled = True
                if made_here:
                    self._say(item)
                return
