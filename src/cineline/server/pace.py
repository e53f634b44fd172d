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
    """Work a second, of the jobs that were done last, while there was any; for any thread.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._done: deque[tuple[float, float]] = deque(maxlen=MOST)

    def idle(self) -> None:
        """Nothing is being done: this time does not count."""
        with self._lock:
            self._since = self._clock()

    def done(self, work: float) -> None:
        """A job is."""
        with self._lock:
            now = self._clock()
            self._done.append((now - self._since, work))
            self._since = now

    def seconds_for(self, work: float) -> int:
        """In which so much is done, in whole seconds from 1 on."""
        with self._lock:
            took, total = (sum(each[column] for each in self._done) for column in (0, 1))
        if total <= 0 or took <= 0:
            return UNKNOWN_S
        return min(LONGEST_S, max(1, math.ceil(work * took / total)))
