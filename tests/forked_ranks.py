"""Ranks forked from one process for all tests: the engine's own way loads the libraries once an engine.

What is tested is the same but for the start itself, which the tests of engine and command line do for real.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest

from cineline import Engine
from cineline.engine import launch
from cineline.rank import worker

PRELOADED = [
    "cineline.families.wan.stages",
    "cineline.rank.loop",
    "cineline.transport.mesh",
    "diffusers.schedulers",
    "toy_family",
    "pytest",  # the main module, which each process runs again
    "frozen",
]

FIXED = ("MKL_CBWR", "OMP_NUM_THREADS")
"""What must be set before torch loads."""

_context = multiprocessing.get_context("forkserver")
_start_ranks = launch.start_ranks


class ForkedRank:
    """A process as `launch.RankProcess` uses one."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        exitcode: int | None = self._process.exitcode
        return exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0.0)
        return int(self._process.exitcode)

    def kill(self) -> None:
        self._process.kill()


def start_forked(ranks: int, environment: Mapping[str, str], family: str | None) -> list[tuple[Connection, Any]]:
    """As `launch.start_ranks`."""
    if any(environment.get(name) != os.environ.get(name) for name in FIXED):
        return _start_ranks(ranks, environment, family)
    return [_fork(environment) for _ in range(ranks)]


@cache
def _start_server() -> None:
    """With this process's path in the environment: Python before 3.13 does not pass it, and skips what is missing."""
    _context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def _fork(environment: Mapping[str, str]) -> tuple[Connection, ForkedRank]:
    _start_server()
    ours, theirs = multiprocessing.Pipe()
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    process = _context.Process(target=_serve, args=(theirs, {**loopback, **environment}), daemon=True)
    process.start()
    theirs.close()
    return ours, ForkedRank(process)


def _serve(connection: Connection, environment: Mapping[str, str]) -> None:
    gc.freeze()  # the libraries' objects stay: collections while a model is built would go through them all
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    worker.serve(connection)


def processes_of(engine: Engine) -> list[psutil.Process]:
    """An engine's ranks, in order."""
    wait_limit = time.monotonic() + 10
    while any(rank.pid is None for rank in engine._ranks._all):
        assert time.monotonic() < wait_limit
    return [psutil.Process(rank.pid) for rank in engine._ranks._all]
