"""What a rank has still to say: messages in order, and snapshots, which can wait."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from cineline.core.control import Message, Snapshot, Unkept
from cineline.core.pieces import cut
from cineline.errors import reason


class Outbox:
    """Filled by any thread, emptied by one, which goes through it; that ends behind the last message.

    Messages go first. Of snapshots the newest one of each request waits, and what is sent of one is a piece, so that a
    message waits for no more than that, or for the making of one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._messages: deque[Message] = deque()
        self._kept: dict[int, Callable[[], Snapshot]] = {}
        self._unkept: set[int] = set()
        self._until = math.inf
        self._last: Message | None = None

    @property
    def waits(self) -> bool:
        """Whether a message does."""
        return bool(self._messages)

    def put(self, message: Message) -> None:
        """Behind the messages that are there."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify()

    def keep(self, request: int, make: Callable[[], Snapshot]) -> None:
        """Instead of the request's one before, if nothing of that was handed out; made when it is its turn."""
        with self._changed:
            self._kept[request] = make
            self._changed.notify()

    def keep_for(self, seconds: float) -> None:
        """What is left of snapshots then is dropped."""
        with self._changed:
            self._until = time.monotonic() + seconds

    def end(self, last: Message) -> None:
        """When nothing else waits: the first of such words is the last of all."""
        with self._changed:
            self._last = self._last or last
            self._changed.notify()

    def __iter__(self) -> Iterator[Message]:
        pieces: Iterator[Message] = iter(())
        while True:
            if self._messages:
                yield self._messages.popleft()
            elif self._in_time() and (piece := next(pieces, None)):
                yield piece
            elif self._due():
                pieces = self._pieces()
            elif self._last:
                yield self._last
                return
            else:
                with self._changed:
                    self._changed.wait_for(lambda: self._messages or self._due() or self._last)

    def _in_time(self) -> bool:
        return time.monotonic() < self._until

    def _due(self) -> bool:
        """Whether there is a snapshot to be made."""
        return bool(self._kept) and self._in_time()

    def _pieces(self) -> Iterator[Message]:
        """Of the snapshot whose request has waited longest."""
        with self._changed:
            request = next(iter(self._kept))
            make = self._kept.pop(request)
        if request in self._unkept:
            return
        try:
            pieces = cut(make())
        except Exception as error:  # whatever a family's state may hold: the request goes on, and the line
            self._unkept.add(request)
            yield Unkept(request, f"{type(error).__name__}: {reason(error)}".removesuffix("."))
        else:
            yield from pieces
