"""How fast jobs are done, to say when to come back."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable

MOST = 50
"""Jobs that are looked back at."""

UNKNOWN_S = 30
"""Where none was done yet."""

LONGEST_S = 3600


class Pace:
    """Work a second, of the jobs that were done last; for any thread.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._done: deque[tuple[float, float]] = deque([(clock(), 0.0)], MOST)

    def done(self, work: float) -> None:
        """A job is."""
        with self._lock:
            self._done.append((self._clock(), work))

    def seconds_for(self, work: float) -> int:
        """In which so much is done, in whole seconds from 1 on."""
        with self._lock:
            began, _ = self._done[0]
            last, _ = self._done[-1]
            total = sum(each for _, each in list(self._done)[1:])
        if total <= 0 or last <= began:
            return UNKNOWN_S
        return min(LONGEST_S, max(1, math.ceil(work * (last - began) / total)))
