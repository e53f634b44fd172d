"""One process that starts the ranks of a machine, tells how they end, and ends them with the engine.

`python -m cineline.rank.nursery --fd N --parent ENGINE --ranks A,B --load MODULE,MODULE` has the ranks' environment,
and of each rank its end of a pipe to the engine. It loads the modules and forks the ranks, since a new Python takes
seconds of a core for that. Without modules it starts a Python for each: an accelerator's driver must not have been
touched before a fork, which libraries may do when they load.

Over its own pipe it says the ranks' processes once all are there, then (number, exit code) of each that ends. It is
told numbers of ranks to kill, and by the pipe's end to kill all.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection

from cineline.core import streams
from cineline.rank import worker
from cineline.rank.owner import die_with, end_with

WORKER = "cineline.rank.worker"


def main() -> None:
    """Start them, and stay until all have ended."""
    streams.secure()
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--ranks", required=True)
    parser.add_argument("--load", default="")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a program that ignores it would take the exit codes
    connection = Connection(options.fd)
    ranks = Ranks()
    end_with(options.parent, ranks.kill_all)
    ends = [int(end) for end in options.ranks.split(",")]
    if options.load:
        _load(options.load.split(","))
        pids = [_fork(connection, end, ends[number + 1 :]) for number, end in enumerate(ends)]
    else:
        pids = [_spawn(end) for end in ends]
    ranks.watch(connection, pids)


class Ranks:
    """The ranks that this process has started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: dict[int, int] | None = None

    def watch(self, connection: Connection, pids: Sequence[int]) -> None:
        """Kill those that the engine names; returns when all have ended."""
        with self._lock:
            self._left = left = {pid: number for number, pid in enumerate(pids)}
        threading.Thread(target=self._obey, args=(connection,), daemon=True).start()
        with contextlib.suppress(OSError):  # it is gone
            connection.send(list(pids))
        while left:
            pid, status = os.wait()
            with self._lock:
                number = left.pop(pid, None)
            with contextlib.suppress(OSError):
                if number is not None:
                    connection.send((number, os.waitstatus_to_exitcode(status)))

    def _obey(self, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._kill(connection.recv())
        self.kill_all()

    def kill_all(self) -> None:
        """Those that have not ended; with none yet, this process."""
        if self._left is None:  # those that there are die with it
            os._exit(1)
        self._kill()

    def _kill(self, named: int | None = None) -> None:
        with self._lock:
            for pid, number in (self._left or {}).items():
                if named in (None, number):
                    with contextlib.suppress(ProcessLookupError):  # it has just ended
                        os.kill(pid, signal.SIGKILL)


def _load(modules: Sequence[str]) -> None:
    gc.disable()  # what libraries make while they load stays
    for module in modules:
        with contextlib.suppress(Exception):  # a rank that cannot load it says why
            importlib.import_module(module)
    gc.freeze()  # else each rank's collections go through all of it, and copy the memory that it shares
    gc.enable()


def _fork(connection: Connection, own: int, others: Sequence[int]) -> int:
    """Start a rank at its end of a pipe, without its brothers' and the engine's; its process's number."""
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # idle threads are not needed in the rank
        pid = os.fork()
    if not pid:
        die_with(parent)
        os.close(connection.fileno())
        for other in others:
            os.close(other)
        worker.serve(Connection(own))
    os.close(own)
    return pid


def _spawn(own: int) -> int:
    command = [sys.executable, "-P", "-m", WORKER, "--fd", str(own), "--parent", str(os.getpid()), "--bound"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(own,))
    process.returncode = 0  # it is waited for as a forked one is
    os.close(own)
    return process.pid


if __name__ == "__main__":
    main()
    os._exit(0)  # libraries' threads may hang in their own clean-up
