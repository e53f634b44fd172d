"""The engine's end of the process that starts the ranks of a machine (`rank.nursery`)."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from multiprocessing.connection import Connection

from cineline.engine.owned import let_go

ANSWER_LIMIT_S = 1.0
"""From a rank's end, or the word to kill it, to the nursery's word of it; a nursery that is stopped is killed."""


class Nursery:
    """The engine's end of one.

    Args:
        connection: to the process. process: itself. ranks: how many it starts.

    Attributes:
        pids: of the ranks; empty until they are there.
        codes: with which they ended.
    """

    def __init__(self, connection: Connection, process: subprocess.Popen[bytes], ranks: int) -> None:
        self._connection = connection
        self._process = process
        self._lock = threading.Lock()
        self.pids: list[int] = []
        self.codes: list[Future[int]] = [Future() for _ in range(ranks)]
        self._listener = threading.Thread(target=self._listen, name="cineline-nursery", daemon=True)
        self._listener.start()

    def kill(self, number: int) -> None:
        """End a rank at once, if it has not ended."""
        if not self.pids:  # it loads, for seconds
            self.kill_all()
            return
        for wakes in (False, True):
            if wakes:  # only it can wait for its children, so that it is better woken than killed
                self._process.send_signal(signal.SIGCONT)
            with self._lock, contextlib.suppress(OSError):  # gone, and its ranks with it
                self._connection.send(number)
            with contextlib.suppress(FutureTimeout):
                self.codes[number].result(ANSWER_LIMIT_S)
                return
        self.kill_all()

    def kill_all(self) -> None:
        """End the process, and with it its ranks."""
        self._process.kill()

    def join(self) -> None:
        """Wait for the process, where all of its ranks have ended."""
        if all(code.done() for code in self.codes):
            self._listener.join(ANSWER_LIMIT_S)

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self.pids = self._connection.recv()
            while True:
                number, code = self._connection.recv()
                self.codes[number].set_result(code)
        own = self._process.wait()
        for code in self.codes:
            if not code.done():
                code.set_result(own)
        with self._lock:
            let_go(self._connection)


class NurseryRank:
    """A rank's process, as `subprocess.Popen` is one."""

    def __init__(self, nursery: Nursery, number: int) -> None:
        self._nursery = nursery
        self._number = number

    @property
    def pid(self) -> int | None:
        """None until it is there."""
        return self._nursery.pids[self._number] if self._nursery.pids else None

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        code = self._nursery.codes[self._number]
        return code.result() if code.done() else None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it has none after `timeout` seconds.
        """
        try:
            code = self._nursery.codes[self._number].result(timeout)
        except FutureTimeout:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0) from None
        self._nursery.join()
        return code

    def kill(self) -> None:
        """End it at once."""
        self._nursery.kill(self._number)
