"""A rank's end of the connection to its engine: what it is told and what it says, with a thread for each way."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NoReturn

from cineline.core import control
from cineline.core.trace import Slice
from cineline.rank.outbox import Outbox
from cineline.rank.pulse import Pulse

SEND_LIMIT_S = 30.0
"""For what is still to be said when a rank ends."""

SNAPSHOTS_LIMIT_S = 1.0
"""For snapshots that wait when a rank fails. A newer one spares its request a step where the ranks are started anew; a
longer wait would cost as much, and the engine looks for whoever failed for no more than moments."""

MOST_SLICES = 10_000
"""That may wait while the engine takes nothing in; older ones go."""

PRINT_LIMIT_S = 2.0
"""For what is still to be printed then: nobody may read it."""


class EngineLink:
    """The connection, and the threads that keep the rank's loop from ever waiting for the engine.

    Attributes:
        connection: itself. inbox: what the engine says, in order.
        pulse: what the rank is at, which the engine is told again and again.
        device: where it computes, in words, once it is known.
    """

    def __init__(self, connection: Connection) -> None:
        self.inbox: queue.SimpleQueue[control.Message] = queue.SimpleQueue()
        self.pulse = Pulse()
        self.device = ""
        self.connection = connection
        self._outbox = Outbox()
        self._slices: deque[Slice] = deque(maxlen=MOST_SLICES)
        self._saying = threading.Lock()
        self._left = threading.Event()
        self._through = False
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()
        threading.Thread(target=self._beat, daemon=True).start()

    def first(self) -> control.Message:
        """The first message; those that follow come to the inbox."""
        message = control.receive(self.connection, control.FROM_ENGINE)
        threading.Thread(target=self._receive_all, daemon=True).start()
        return message

    def say(self, message: control.Message) -> None:
        """Have it sent."""
        self._outbox.put(message)

    def keep(self, request: int, make: Callable[[], control.Snapshot]) -> None:
        """Have a snapshot sent; see `control.KeepSnapshot`."""
        self._outbox.keep(request, make)

    def computed(self, piece: Slice) -> None:
        """Have the engine told with the next beat."""
        self._slices.append(piece)

    def leave(self, timeline: control.Timeline) -> NoReturn:
        """Through: say so, and end when the engine hangs up, since the others may still need what was sent to them."""
        self._through = True
        self._outbox.keep_for(0.0)
        self._say_slices()
        self.say(timeline)
        self._left.wait()  # the owner's end is another (`owner`)
        os._exit(0)  # backends' threads may hang in their own clean-up

    def fail(self, failure: control.Failed, details: str = "") -> NoReturn:
        """End at once, when that is said and the details are printed."""
        self._outbox.keep_for(SNAPSHOTS_LIMIT_S)
        self._outbox.end(failure)
        self._sender.join(SEND_LIMIT_S)
        printing = threading.Thread(target=_print, args=(details,), daemon=True)
        printing.start()
        printing.join(PRINT_LIMIT_S)
        os._exit(1)

    def _send_all(self) -> None:
        for message in self._outbox:
            try:
                self.connection.send_bytes(_packed(message))
            except OSError:
                self._hung_up()

    def _receive_all(self) -> None:
        """Take in what the engine says; end at once when it is gone, whatever the loop waits for."""
        while True:
            try:
                self.inbox.put(control.receive(self.connection, control.FROM_ENGINE))
            except control.UnreadableMessage as error:
                self.fail(control.Failed(f"it cannot read what the engine said ({error})"))
            except (EOFError, OSError):
                self._hung_up()
                return

    def _hung_up(self) -> None:
        if not self._through:
            os._exit(1)
        self._left.set()

    def _beat(self) -> None:
        """Say that this process is alive, unless it could not be sent, which the engine sees by itself."""
        while True:
            if not self._outbox.waits:
                self._say_slices()
                self.say(self.pulse.beat())
            time.sleep(control.BEAT_EVERY_S)

    def _say_slices(self) -> None:
        """All that there are; when it returns none is on its way to be said."""
        with self._saying:
            found = [self._slices.popleft() for _ in range(len(self._slices))]
            if found:
                self.say(control.Slices(tuple(found)))


def _print(details: str) -> None:
    print(details, end="", file=sys.stderr, flush=True)


def _packed(message: control.Message) -> bytes:
    """As it travels; of an error that cannot the words."""
    try:
        return control.pack(message)
    except Exception as error:  # whatever an error's class may raise
        cause = message.cause if isinstance(message, control.Failed) else f"it cannot say what it should ({error})"
        return control.pack(control.Failed(cause))
