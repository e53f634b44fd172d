"""A process that ends with the one that started it, however that died and whatever else it had started.

A pipe to it would not tell: whatever it forked holds the pipe, too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal that a process gets when the thread that started it ends."""

LOOK_EVERY_S = 0.25


def end_with(parent: int, end: Callable[[], object] | None = None) -> None:
    """Have `end` called, from a thread, once the parent is gone; without one the process exits at once."""
    threading.Thread(target=_watch, args=(parent, end), name="cineline-owner", daemon=True).start()


def die_with(parent: int) -> None:
    """Have the kernel kill this process, even one that is stopped, once the parent's main thread, which has started it,
    is gone; where no kernel does, the process exits."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    end_with(parent)


def _watch(parent: int, end: Callable[[], object] | None) -> None:
    while os.getppid() == parent:  # of a process whose parent died it is another's number
        time.sleep(LOOK_EVERY_S)
    if end is None:
        os._exit(1)
    end()
