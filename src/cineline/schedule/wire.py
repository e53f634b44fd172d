"""Simulated time, and edges on which messages take some (no torch)."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from functools import partial

from cineline.core.request import WorkItem
from cineline.core.trace import slice_name
from cineline.errors import Deadlock
from cineline.schedule.words import Edge, Value


class Clock:
    """What will happen, in order. `now` is in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._made = 0

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        """Let it happen so many seconds from now; of two at one time the first made comes first."""
        self._made += 1
        heapq.heappush(self._events, (self.now + seconds, self._made, happen))

    def tick(self) -> bool:
        """Go on to the next event; false where there is none."""
        if self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
            return True
        return False


class Wire:
    """An edge at work: a message travels once it is sent, received and the one before it is through.

    Args:
        arrived: called when a message is here.
    """

    def __init__(self, edge: Edge, clock: Clock, arrived: Callable[[], None]) -> None:
        self._edge = edge
        self._clock = clock
        self._arrived = arrived
        self._sent: deque[tuple[_Sent, float]] = deque()
        self._posted: deque[_Sent] = deque()
        self._here: set[_Sent] = set()
        self._is_busy = False

    @property
    def underway(self) -> int:
        """Messages that are sent and not here."""
        return len(self._sent)

    def post(self, item: WorkItem, value: Value) -> None:
        """Receive the next message, which should be that value of the item."""
        self._posted.append((item, value))
        self._travel()

    def send(self, item: WorkItem, value: Value, seconds: float) -> None:
        """Send a message that travels so long."""
        self._sent.append(((item, value), seconds))
        self._travel()

    def take(self, item: WorkItem, value: Value) -> bool:
        """Take a message; false while it is not here."""
        is_here = (item, value) in self._here
        self._here.discard((item, value))
        return is_here

    def _travel(self) -> None:
        if self._is_busy or not self._sent or not self._posted:
            return
        (message, seconds), expected = self._sent[0], self._posted.popleft()
        if message != expected:
            raise Deadlock(
                f"The two ends of {self._edge} disagree: {_words(message)} is sent, and {_words(expected)} is "
                "expected; sends and receives must have one order."
            )
        self._is_busy = True
        self._clock.after(seconds, partial(self._arrive, message))

    def _arrive(self, message: _Sent) -> None:
        self._is_busy = False
        self._sent.popleft()
        self._here.add(message)
        self._travel()
        self._arrived()


_Sent = tuple[WorkItem, Value]
"""A message: who makes it, and what it is."""


def _words(message: _Sent) -> str:
    item, value = message
    return f"{value.value} of {slice_name(item)}"
