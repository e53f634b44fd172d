"""One process that loads the libraries and forks the ranks of a machine: a new Python takes seconds of a core for that.

`python -m cineline.rank.nursery --fd N --ranks A,B --load MODULE,MODULE` has the ranks' environment. It loads, forks a
rank for each descriptor (the rank's end of a pipe to the engine), says so over N, and stays to tell how they end. It
is for the CPU: an accelerator's driver must not have been touched before a fork, which libraries may do when they load.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import os
import signal
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

from cineline.core import streams
from cineline.core.control import FORKED
from cineline.rank import worker

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal that a process gets when its parent dies."""


def main() -> None:
    """Load, fork, watch."""
    streams.secure()
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--ranks", required=True)
    parser.add_argument("--load", required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a program that ignores it would take the exit codes
    connection = Connection(options.fd)
    gc.disable()  # what libraries make while they load stays
    for module in options.load.split(","):
        with contextlib.suppress(Exception):  # a rank that cannot load it says why
            importlib.import_module(module)
        if connection.poll():  # the engine says nothing yet: it is gone
            return
    gc.freeze()  # else each rank's collections go through all of it, and copy the memory that it shares
    gc.enable()
    ends = [int(end) for end in options.ranks.split(",")]
    pids = [_fork(connection, end, ends[number + 1 :]) for number, end in enumerate(ends)]
    _watch(connection, pids)


def _fork(connection: Connection, own: int, others: Sequence[int]) -> int:
    """Start a rank at its end of a pipe, without its brothers' and the engine's; its process's number.

    The rank dies with this process, which alone can tell of it.
    """
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # libraries' idle threads are not needed in the rank
        pid = os.fork()
    if not pid:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.close(connection.fileno())
        for other in others:
            os.close(other)
        worker.serve(Connection(own))
    os.close(own)
    return pid


def _watch(connection: Connection, pids: Sequence[int]) -> None:
    """Tell the engine how each rank ends, and end those that it names, or all when it is gone."""
    left = {os.pidfd_open(pid): number for number, pid in enumerate(pids)}
    with contextlib.suppress(EOFError, OSError):
        connection.send(FORKED)
        while left:
            for ready in wait([connection, *left]):
                if isinstance(ready, int):
                    number = left.pop(ready)
                    os.close(ready)
                    _, status = os.waitpid(pids[number], 0)
                    connection.send((number, os.waitstatus_to_exitcode(status)))
                elif (number := connection.recv()) in left.values():
                    os.kill(pids[number], signal.SIGKILL)
    for number in left.values():
        os.kill(pids[number], signal.SIGKILL)


if __name__ == "__main__":
    main()
    os._exit(0)  # libraries' threads may hang in their own clean-up
