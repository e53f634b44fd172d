"""Keeps the host close to an accelerator, which works through its queue behind the host's back.

Without it a stage would put all steps in the queue at once: progress would be told before it is made,
and a cancel would come after the work it should save.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from cineline.core.control import Message

ITEMS_AHEAD = 2
"""Items that may be in the device's queue before the host waits for the oldest one."""


class Mark(Protocol):
    """A point in the device's queue."""

    def synchronize(self) -> None:
        """Wait until the device has got there."""
        ...


class Pace:
    """Passes reports on when the device has done the item they belong to.

    Args:
        report: where they go.
        mark: makes a mark at the end of the queue; None on the CPU, where what returns is done.
    """

    def __init__(self, report: Callable[[Message], None], mark: Callable[[], Mark] | None) -> None:
        self._report = report
        self._mark = mark
        self._said: list[Message] = []
        self._underway: deque[tuple[Mark, list[Message]]] = deque()

    def report(self, message: Message) -> None:
        """Report something of the current item."""
        if self._mark is None:
            self._report(message)
        else:
            self._said.append(message)

    def end_item(self) -> None:
        """The host is through with the current item."""
        if self._mark is None:
            return
        self._underway.append((self._mark(), self._said))
        self._said = []
        while len(self._underway) > ITEMS_AHEAD:
            self._settle_oldest()

    def settle(self) -> None:
        """Wait for all items: the host has nothing else to do."""
        while self._underway:
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        mark, said = self._underway.popleft()
        mark.synchronize()
        for message in said:
            self._report(message)


def marker(device: torch.device) -> Callable[[], Mark] | None:
    """What makes a `Pace`'s marks on a device."""
    if device.type == "cpu":
        return None

    def mark() -> Mark:
        event = torch.Event(device)
        event.record()
        return event

    return mark
