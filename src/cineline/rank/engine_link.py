"""A rank's end of the connection to its engine: what it is told and what it says, with a thread for each way."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import NoReturn

from cineline.core import control
from cineline.rank.pulse import Pulse

SEND_LIMIT_S = 30.0
"""For what is still to be said when a rank ends."""

LEAVE_LIMIT_S = 600.0
"""That a rank which is through waits for the others, and so for the engine to hang up."""


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
        self._outbox: queue.SimpleQueue[control.Message | None] = queue.SimpleQueue()
        self._left = threading.Event()
        self._through = False
        self._sender = threading.Thread(target=self._send_all, daemon=True)
        self._sender.start()
        threading.Thread(target=self._beat, daemon=True).start()

    def first(self) -> control.Message:
        """The first message; those that follow come to the inbox."""
        message = control.receive(self.connection)
        threading.Thread(target=self._receive_all, daemon=True).start()
        return message

    def say(self, message: control.Message) -> None:
        """Have it sent."""
        self._outbox.put(message)

    def leave(self) -> NoReturn:
        """Through: end when the engine hangs up, since the others may still need what this process has sent."""
        self._through = True
        self._left.wait(LEAVE_LIMIT_S)
        sys.stderr.flush()
        os._exit(0)  # backends' threads may hang in their own clean-up

    def fail(self, failure: control.Failed) -> NoReturn:
        """End at once, when that is said."""
        self.say(failure)
        self._outbox.put(None)
        self._sender.join(SEND_LIMIT_S)
        sys.stderr.flush()
        os._exit(1)

    def _send_all(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self.connection.send_bytes(control.pack(message))
            except OSError:
                self._hung_up()

    def _receive_all(self) -> None:
        """Take in what the engine says; end at once when it is gone, whatever the loop waits for."""
        while True:
            try:
                self.inbox.put(control.receive(self.connection))
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
            if self._outbox.empty():
                self.say(self.pulse.beat())
            time.sleep(control.BEAT_EVERY_S)
