"""What a rank is at and for how long, so that the engine can tell one that is slow from one that hangs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cineline.core.control import Beat
from cineline.core.request import Job, Kind, WorkItem

TIMES_LONGEST = 10.0
"""An item that takes so many times what the longest of its kind and size has taken so far hangs."""

LEAST_LIMIT_S = 60.0
"""No item hangs before."""

MOST_BETWEEN_S = 2.0
"""From beat to beat; where more has passed the process did not run, and so did not compute."""

Size = tuple[Kind, int, int, int]
"""What an item's time depends on: kind, height, width, frames."""


@dataclass
class Pulse:
    """The item that is computed now, and what such items have taken. One thread writes, another asks.

    Args:
        clock: seconds.

    Attributes:
        request: whose turn it is, from before what its item needs is here.
        words: the item that is computed, or was in this turn; empty where none was.
    """

    clock: Callable[[], float] = time.monotonic
    request: int | None = None
    words: str = ""
    _now: tuple[WorkItem, Size, float] | None = None
    _since_ns: int = 0
    _beaten: tuple[float, float] = (0.0, 0.0)
    _busy_s: float = 0.0
    _longest: dict[Size, float] = field(default_factory=dict)

    def turns(self, request: int) -> None:
        """It is the request's turn."""
        self.request, self.words = request, ""

    def rests(self) -> None:
        """It is nobody's."""
        self.ends()
        self.request, self.words = None, ""

    def starts(self, item: WorkItem, job: Job) -> None:
        """All that the item needs is here."""
        since = self.clock()
        self._since_ns, self._beaten = time.time_ns(), (since, 0.0)
        self.words = _words(item)
        self._now = item, (item.kind, job.height, job.width, job.num_frames), since

    def ends(self) -> None:
        """The item is computed, or was none that is; what follows may wait for others."""
        if self._now is not None:
            _, size, since = self._now
            took_s = self.clock() - since
            self._longest[size] = max(self._longest.get(size, 0.0), took_s)
            self._busy_s += took_s
            self._now = None

    def beat(self) -> Beat:
        """What the engine is told."""
        now = self._now
        if now is None:
            return Beat(busy_s=self._busy_s)
        item, size, since = now
        last, computing = self._beaten
        here = self.clock()
        self._beaten = here, computing + min(here - last, MOST_BETWEEN_S)
        longest = self._longest.get(size)
        limit = None if longest is None else max(LEAST_LIMIT_S, TIMES_LONGEST * longest)
        words = f"{_words(item)} of request {item.request}"
        return Beat(words, self._beaten[1], limit, item.request, self._busy_s + here - since, self._since_ns)


def _words(item: WorkItem) -> str:
    return f"{item.kind.name.lower()} {item.number}"
