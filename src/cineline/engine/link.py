"""One rank's connection, with a thread that writes and one that reads: nobody else ever waits for a rank."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from cineline.core import control
from cineline.core.control import Beat, Failed, Message, Piece
from cineline.core.pieces import Joiner
from cineline.engine.owned import let_go, own

MOST_UNSENT = 4096
"""Messages that may wait for a rank; one that is not stopped takes them in at once, whatever it computes."""

JOIN_LIMIT_S = 10.0


class Link:
    """The engine's end of a rank's connection.

    Args:
        hear: called from a thread with what the rank says, but for beats, snapshots whole; last with what ended the
            connection.
        describe_end: how the rank ended, in words; asked when its connection has.

    Attributes:
        heard: when it last said anything, by `time.monotonic`. beat: the last one.
    """

    def __init__(
        self, connection: Connection, hear: Callable[[Message], None], describe_end: Callable[[], str]
    ) -> None:
        self.heard = time.monotonic()
        self.beat: Beat | None = None
        self._connection = connection
        self._socket = own(socket.socket(fileno=os.dup(connection.fileno())))  # shut down while others use it
        self._hear = hear
        self._describe_end = describe_end
        self._unsent: queue.Queue[bytes | None] = queue.Queue(MOST_UNSENT)
        self._choked = False
        self._threads: list[threading.Thread] = []
        try:
            for each in (self._write, self._read):
                thread = threading.Thread(target=each, daemon=True)
                thread.start()
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def say(self, message: bytes) -> None:
        """Have a message (`control.pack`) sent; returns at once."""
        try:
            self._unsent.put_nowait(message)
        except queue.Full:
            if not self._choked:
                self._hear(Failed(f"it has not taken in the last {MOST_UNSENT} messages"))
            self._choked = True

    def hang_up(self) -> None:
        """End the connection, whatever the threads wait for; the rank ends by that, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free all that belongs to it; the rank is gone."""
        self.hang_up()
        with contextlib.suppress(queue.Full):
            self._unsent.put_nowait(None)
        for thread in self._threads:
            thread.join(JOIN_LIMIT_S)
        let_go(self._socket)
        let_go(self._connection)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # it is gone; the reader hears of that and knows the cause
            while (message := self._unsent.get()) is not None:
                self._connection.send_bytes(message)

    def _read(self) -> None:
        joiner = Joiner()
        try:
            while True:
                message: Message | None = control.receive(self._connection)
                self.heard = time.monotonic()
                if isinstance(message, Beat):
                    self.beat = message
                    continue
                if isinstance(message, Piece):
                    message = joiner.join(message)
                if message is not None:
                    self._hear(message)
                if isinstance(message, Failed):  # it ends by that
                    return
        except control.UnreadableMessage as error:
            self._hear(Failed(f"what it said cannot be read ({error})"))
        except (EOFError, OSError):
            self._hear(Failed(self._describe_end()))
