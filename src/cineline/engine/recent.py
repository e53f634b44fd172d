"""What ranks have computed lately, slice by slice."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from itertools import islice

from cineline.core.trace import Slice

MOST_SLICES = 20_000
"""That are kept: a minute of 333 a second."""


class Recent:
    """The last slices, in the order in which they were told. Any thread adds, any thread asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slices: deque[Slice] = deque(maxlen=MOST_SLICES)
        self._count = 0

    def add(self, slices: Iterable[Slice]) -> None:
        """Behind those that are there."""
        with self._lock:
            for piece in slices:
                self._slices.append(piece)
                self._count += 1

    def since(self, count: int) -> tuple[int, list[Slice]]:
        """How many there have been so far, and those behind the first so many, as far as they are kept."""
        with self._lock:
            found = list(islice(reversed(self._slices), self._count - count))
            return self._count, found[::-1]
