"""Keeps the host close to its device, which may work through its queue behind the host's back.

Without it a stage would put all steps in the queue at once: progress would be told before it is made,
and a cancel would come after the work it should save.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cineline.transport.queue import DeviceQueue, Mark

ITEMS_AHEAD = 2
"""Items that may be in the device's queue before the host waits for the oldest one."""


class Pace:
    """Does things when the device has done the item they belong to.

    Args:
        queue: the device's.
    """

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self._due: list[Callable[[], None]] = []
        self._underway: deque[tuple[Mark, list[Callable[[], None]]]] = deque()

    def after(self, deed: Callable[[], None]) -> None:
        """Have it done when the device is through with the current item: at once, where it is already."""
        if self._underway or self._due or not self._queue.mark().query():
            self._due.append(deed)
        else:
            deed()

    def end_item(self) -> None:
        """The host is through with the current item."""
        self._underway.append((self._queue.mark(), self._due))
        self._due = []
        while self._underway and (len(self._underway) > ITEMS_AHEAD or self._underway[0][0].query()):
            self._settle_oldest()

    def settle(self) -> None:
        """Wait for all items: the host has nothing else to do."""
        while self._underway:
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        mark, due = self._underway.popleft()
        mark.synchronize()
        for deed in due:
            deed()
